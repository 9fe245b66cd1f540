"""Networks of other people's EDM code -> the folder of an EDMPipeline: their files are read as data, nothing in them runs."""
