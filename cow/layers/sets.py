"""The sets of a layer: which chunks it holds, and what is known of them. Pure: no I/O, nothing durable.

Code that writes a chunk or a journal record says so by one of the methods below; nothing else changes the sets. Readers
look at the attributes themselves.
"""

from pyroaring import BitMap64


class LayerSets:
    """The sets of one layer. Trio thread only."""

    def __init__(self) -> None:
        self.held = BitMap64()  #: the chunks that readers find here
        self.lost = BitMap64()  #: chunks that should be here but could not be kept: readers get EIO, unless held again
        self.uncommitted = BitMap64()  #: held, but recovery would not find it: written since the last commit
        self.intended = BitMap64()  #: committed earlier, perhaps overwritten in place since
        self.dirty = False  #: whether the journal has commits that the last checkpoint does not cover

    @property
    def known(self) -> BitMap64:
        """The chunks for which readers ask no further layer: those held and those lost."""
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
        """After `rehash`: chunks that may have been overwritten in place count as they are, also in the next map."""
        self.intended = BitMap64()
        self.dirty = True

    def pass_over_intended(self) -> None:
        """Stop holding chunks that may have been overwritten in place: they cannot be checked before a rehash."""
        self.held -= self.intended

    def shadow(self, known: BitMap64) -> BitMap64:
        """Drop the chunks that a layer asked before this one knows. Returns those that were held, to be punched out."""
        shadowed = self.held & known
        self.lost -= known
        if shadowed:
            self.held -= shadowed
            self.dirty = True
        return shadowed

    def hand_over(self, target: "LayerSets", held: BitMap64, lost: BitMap64) -> None:
        """Have `target` take over chunks that this layer held or had lost, as recorded in the journal.

        Chunks that this layer has dropped since they were copied, because the group came to serve an older snapshot,
        are not needed any more: `target` does not take them.
        """
        target.commit(held & self.known)
        target.lose(lost & self.lost)
        self.held -= held
        self.lost -= held | lost
        self.dirty = True

    def take_over(self, held: BitMap64, lost: BitMap64) -> None:
        """Begin with the sets of a map."""
        self.held, self.lost = held, lost

    def note_encoded(self) -> None:
        """The sets are about to be saved as they are."""
        self.dirty = False

    def note_unsaved(self) -> None:
        """They could not be saved, so the next checkpoint has to."""
        self.dirty = True
