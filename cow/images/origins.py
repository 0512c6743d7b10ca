"""The origins of a store together: one mkdir takes a snapshot of all of them, at one instant."""

import math

import trio

from cow.errors import HoldTimeoutError
from cow.images.origin import Origin
from cow.layers.epochs import Epochs


class Origins(list[Origin]):
    """The origins, in the order of the store's sources. Trio thread only."""

    @property
    def epochs(self) -> list[Epochs]:
        """The epochs of each origin."""
        return [origin.epochs for origin in self]

    async def run(self) -> None:
        """The origins' background work; runs until cancelled."""
        async with trio.open_nursery() as nursery:
            for origin in self:
                nursery.start_soon(origin.run)

    async def drain(self, seconds: float = math.inf) -> None:
        """Have all acknowledged writes written to the devices; not yet durable.

        Raises HoldTimeoutError when that takes longer than `seconds`, and the error of a device that does not take all.
        """
        try:
            with trio.fail_after(seconds):
                for origin in self:
                    await origin.drain()
        except trio.TooSlowError as error:
            raise HoldTimeoutError(
                f"writes that were acknowledged did not reach the device within {seconds:g} s, so no snapshot was "
                f"taken: check the device and the store for errors, then try again"
            ) from error
