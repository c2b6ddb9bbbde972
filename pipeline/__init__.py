"""Config, storage, sources, stages, engine, command line and reports. The only package that imports ray."""

__version__ = "0.1.0"
