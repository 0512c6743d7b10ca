"""fio, which writes blocks of many sizes and checks each against its checksum."""

from tests.support.sandbox import Sandbox, run


def fio_verify(sandbox: Sandbox, target: object, mib: int, *options: str, seed: int = 7) -> None:
    """Write `mib` MiB of the target at random and read them back; with options of fio, only one of both."""
    run(
        "fio", "--name=verify", f"--filename={target}", "--rw=randwrite", "--bssplit=512/30:4k/30:64k/25:1m/15",
        f"--size={mib}M", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", f"--randseed={seed}",
        "--ioengine=psync", *options, cwd=sandbox.path,
    )  # fmt: skip
