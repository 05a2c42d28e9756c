"""Meta-World as a robot behind ROS topics."""
