"""What a run learns from: prompts, captioned pictures, their encoded shards, and the rows that a draw takes."""
