"""What measures: image sets in, numbers and a report out. Imports pipelines/ only.

The name is that of a Python builtin: write `from eval.x import y`, never `import eval` or `import eval.x`, which would
hide the builtin in the importing module. Pixels are uint8 (n, c, h, w) everywhere in here.
"""
