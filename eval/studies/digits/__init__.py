"""The study of the 8x8 digits: a teacher and its students beside each other, by a classifier trained here in seconds."""
