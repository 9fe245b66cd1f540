"""The study of the emoji: the embedded Stable Diffusion and its one-step students beside each other, by the embedded CLIP."""
