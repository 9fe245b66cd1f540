"""How the teacher in assets/ was made: pictures, autoencoder, CLIP, the folder they are put into. See assets/README.md."""
