"""The ROS edge: it decides when, the core decides what."""
