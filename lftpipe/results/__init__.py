"""The JSON files that lftpipe writes, as types: sealed when written, validated when read. No torch."""
