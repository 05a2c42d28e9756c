"""One-step vision-language robot policies for ROS 2."""
