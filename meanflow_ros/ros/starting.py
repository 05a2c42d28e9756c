"""How the two nodes start: refused arguments, and an interrupt, end them without a traceback.

PyTorch takes seconds to import. An interrupt ends the process meanwhile as it does afterwards:
cleanly, and with exit code 0. Nothing heavy is imported here.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence

INTERRUPTS = (signal.SIGINT, signal.SIGTERM)


def policy_node() -> int:
    """Run the policy node, as `ros2 run` and `ros2 launch` do."""
    _end_at_an_interrupt()
    from meanflow_ros.ros.policy_node import main
    return main()


def sim_node() -> int:
    """Run the simulated robot, as `ros2 run` and `ros2 launch` do."""
    _end_at_an_interrupt()
    from meanflow_ros.sim.sim_node import main
    return main()


def _end_at_an_interrupt() -> None:
    """Until the node has handlers of its own; there is nothing to clean up yet."""
    for number in INTERRUPTS:
        signal.signal(number, lambda *_: os._exit(0))


def interrupt(*_) -> None:
    """Interrupt the main thread once: a second Ctrl-C would interrupt the clean-up."""
    for number in INTERRUPTS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def initialize(name: str, arguments: Sequence[str] | None, make: Callable):
    """Return the node that `make` returns, in an initialized rclpy that handles no signals.

    Ctrl-C and SIGTERM are a KeyboardInterrupt from now on. SystemExit with one line for arguments
    that are not for ROS, or that ROS cannot read.
    """
    import rclpy
    from rclpy.exceptions import NameValidationException, ParameterException
    from rclpy.signals import SignalHandlerOptions
    from rclpy.utilities import remove_ros_args

    for number in INTERRUPTS:
        signal.signal(number, interrupt)
    arguments = list(sys.argv if arguments is None else arguments)
    try:
        rclpy.init(args=arguments, signal_handler_options=SignalHandlerOptions.NO)
        foreign = remove_ros_args(arguments)[1:]
        if foreign:
            raise ValueError(f'unknown arguments: {" ".join(foreign)}; a parameter is given by '
                             f'--ros-args -p name:=value, a file by --ros-args --params-file FILE')
        return make()
    except (ValueError, RuntimeError, NameValidationException, ParameterException) as error:
        rclpy.try_shutdown()
        sys.exit(f'{name}: {_in_one_line(error)}')
    except BaseException:
        rclpy.try_shutdown()
        raise


def _in_one_line(error: Exception) -> str:
    """Return an error of rcl without the places in its source that it names."""
    text = str(error).split(', at /')[0]
    if type(error).__name__ == 'UnknownROSArgsError':
        text = f'unknown arguments after --ros-args: {text}'
    return ' '.join(text.split())
