"""The type checker of the import hook: beartype, with an int where a float is asked for, as Python means it."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
