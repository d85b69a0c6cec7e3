"""The six axes. Each is one package: ``base.py`` (the contract), a table in ``__init__.py``, one file per option."""
