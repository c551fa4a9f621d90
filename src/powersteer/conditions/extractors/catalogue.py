"""Imported, it registers every extractor; none imports what only it needs before it is built or called."""

from powersteer.conditions.discovery import import_modules

import_modules("powersteer.conditions.extractors")
