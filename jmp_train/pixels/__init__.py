"""Changes of images in NumPy arrays: windows and resampling, colours, operations of Pillow."""
