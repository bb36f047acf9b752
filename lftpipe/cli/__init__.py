"""The command line: parse, call one stage, print what it returns or its error."""
