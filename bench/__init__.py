"""Measurements of the library, beside what else there is."""
