"""Taking over what others' code made: the APTP authors' released checkpoints."""

from prunekit.importing.aptp import Imported, import_aptp

__all__ = ["Imported", "import_aptp"]
