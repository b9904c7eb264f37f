"""The run-time type checker that conftest.py installs. An int is accepted as a float, as in static typing."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
