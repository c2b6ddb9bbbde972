"""Files and objects: every read and write, local or remote."""
