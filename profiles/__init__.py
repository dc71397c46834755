"""YAML cards; this file only lets a wheel carry them."""
