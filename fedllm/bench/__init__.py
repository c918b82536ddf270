"""Judging codecs on real client updates: a diagnostic that is not private, for choosing by evidence."""
