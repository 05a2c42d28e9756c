"""What a checkpoint does, measured through the code that runs on the robot."""
