"""What every room is built on: errors, progress, whole files, one writer, devices, the workspace."""
