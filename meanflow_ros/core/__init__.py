"""The policy itself: PyTorch and NumPy only, never ROS."""
