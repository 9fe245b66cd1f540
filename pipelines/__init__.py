"""What runs a model: noise levels, denoisers, students and the diffusers pipelines that draw images from them."""
