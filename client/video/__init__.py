"""Video files, streams of images and pipes: reading, color conversion, encoding and muxing."""
