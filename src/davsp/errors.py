"""What the user did wrong, in one sentence."""


class DavspError(Exception):
    """A mistake the user can mend; the message names the file, field or argument and the mend."""


class Interrupted(DavspError):
    """The user stopped a run; the state is on disk and the message says how to go on."""
