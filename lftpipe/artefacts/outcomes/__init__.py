"""What each command says it found or made: the keys that `--json` prints, as types."""
