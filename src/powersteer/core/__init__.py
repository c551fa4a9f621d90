"""What every room stands on: the doors for foreign bytes, files that are whole or not there, plain printing."""
