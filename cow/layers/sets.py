"""The sets of a layer: which chunks it holds, and what is known of them. Pure: no I/O, nothing durable.

Whoever writes a chunk or a journal record says so by one of the methods below; nothing else changes the sets. Readers
look at the attributes themselves.
"""

from pyroaring import BitMap64


class LayerSets:
    """Trio thread only."""

    def __init__(self) -> None:
        self.held = BitMap64()  #: what readers find here
        self.lost = BitMap64()  #: what should be here and could not be kept: readers get EIO, unless it is held again
        self.uncommitted = BitMap64()  #: held, but recovery would not find it: written since the last commit
        self.intended = BitMap64()  #: committed earlier, perhaps overwritten in place since
        self.dirty = False  #: whether the journal has commits that the last checkpoint had not

    @property
    def known(self) -> BitMap64:
        """The chunks that readers look for here and no further: those held and those lost."""
        return self.held | self.lost if self.lost else self.held

    def commit(self, chunks: BitMap64) -> None:
        """Take over chunks that the journal has: readers and the next checkpoint find them."""
        self.held |= chunks
        self.uncommitted -= chunks
        self.intended -= chunks
        self.lost -= chunks
        self.dirty = True

    def lose(self, chunks: BitMap64) -> None:
        """Take over chunks that the journal says are lost."""
        self.lost |= chunks
        self.held -= chunks
        self.uncommitted -= chunks
        self.intended -= chunks
        self.dirty = True

    def wrote(self, chunks: BitMap64) -> None:
        """Have readers find chunks that were written. Recovery will not find those that are new before `commit`."""
        self.uncommitted |= chunks - self.held
        self.held |= chunks

    def announce(self, chunks: BitMap64) -> None:
        """Committed chunks may be overwritten in place from now on, until they are committed again.

        Called before their INTENT is appended to the journal, because a new journal file begins with all that are open.
        """
        self.intended |= chunks

    def withdraw(self, chunks: BitMap64) -> None:
        """Take `announce` back: the INTENT could not be recorded, so nothing was overwritten."""
        self.intended -= chunks

    def settle(self) -> None:
        """After `rehash`: what may have been overwritten in place is as it is, and the next map says so."""
        self.intended = BitMap64()
        self.dirty = True

    def pass_over_intended(self) -> None:
        """Hold what may have been overwritten in place no more: it cannot be checked before it is rehashed."""
        self.held -= self.intended

    def shadow(self, known: BitMap64) -> BitMap64:
        """Drop what a layer knows that is asked before this one. Returns what was held of it, to be punched out."""
        shadowed = self.held & known
        self.lost -= known
        if shadowed:
            self.held -= shadowed
            self.dirty = True
        return shadowed

    def hand_over(self, target: "LayerSets", held: BitMap64, lost: BitMap64) -> None:
        """Have `target` take over chunks that this layer held or had lost, as the journal has it.

        What this layer has dropped since they were copied, because the group came to serve an older snapshot, is not
        wanted any more: `target` does not take it.
        """
        target.commit(held & self.known)
        target.lose(lost & self.lost)
        self.held -= held
        self.lost -= held | lost
        self.dirty = True

    def take_over(self, held: BitMap64, lost: BitMap64) -> None:
        """Begin with what a map says."""
        self.held, self.lost = held, lost

    def note_encoded(self) -> None:
        """The sets are about to be saved as they are."""
        self.dirty = False

    def note_unsaved(self) -> None:
        """They could not be saved, so the next checkpoint has to."""
        self.dirty = True
