"""The command line: recipe in, bundle out, stage by stage."""
