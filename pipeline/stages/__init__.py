"""The stages, one file each or one a method, and the table that they make."""
