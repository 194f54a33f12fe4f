"""The command line: `quire serve`, `quire chat`, `quire bench`, `quire top`."""
