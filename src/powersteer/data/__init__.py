"""Pairs on disk → batches: folders of pairs, their cache, and the OpenMoji drawings."""
