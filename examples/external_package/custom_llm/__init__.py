"""Models for sglite. Each module that brings one names it in `EntryClass`."""
