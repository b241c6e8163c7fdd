"""All code of this project that is for CPUs alone, behind one door: matrix products and attention by tiles."""
