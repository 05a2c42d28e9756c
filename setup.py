from pathlib import Path

from setuptools import find_packages, setup

package_name = 'meanflow_ros'


def installed(*roots: str) -> list[tuple[str, list[str]]]:
    """Pair every folder below the roots with its files, as data_files wants them."""
    files = sorted(path for root in roots for path in Path(root).rglob('*')
                   if path.is_file() and '__pycache__' not in path.parts)
    folders = sorted({path.parent for path in files})
    return [(f'share/{package_name}/{folder.as_posix()}',
             [path.as_posix() for path in files if path.parent == folder])
            for folder in folders]


setup(
    name=package_name,
    version='0.1.0',
    packages=find_packages(exclude=['test']),
    package_data={f'{package_name}.core': ['*.cu'],
                  f'{package_name}.evaluation.report': ['*.html', '*.css', '*.js']},
    data_files=[
        ('share/ament_index/resource_index/packages', [f'resource/{package_name}']),
        (f'share/{package_name}', ['package.xml']),
        *installed('config', 'launch', 'resource/default_policy'),
    ],
    python_requires='>=3.10',
    install_requires=[
        'numpy>=1.26',
        'opencv-python-headless>=4.6',
        'pyyaml',
        'rosbags>=0.10',
        'ruckig>=0.14',  # commands that keep velocity, acceleration and jerk limits
        'safetensors',
        'setuptools',
        'tokenizers',
        'torch>=2.6',
        'tqdm',
        'transformers>=5,<6',
    ],
    extras_require={
        # Where no ROS 2 is sourced: Jazzy as wheels, the versions that were tested together.
        'ros': [
            'ros-rclpy[fastrtps]==7.1.6',
            'ros-jazzy-diagnostic-msgs==5.3.6',
            'ros-jazzy-geometry-msgs==5.3.6',
            'ros-jazzy-lifecycle-msgs==2.0.3',
            'ros-jazzy-rosgraph-msgs==2.0.3',
            'ros-jazzy-sensor-msgs==5.3.6',
            'ros-jazzy-std-srvs==5.3.6',
            'ros-jazzy-trajectory-msgs==5.3.6',
        ],
        # The simulated robot, and the demo's video and figures. metaworld pins mujoco and
        # forgets packaging.
        'sim': ['metaworld==3.1.1', 'packaging', 'matplotlib', 'av'],
        # What a run draws: curves as a picture and for TensorBoard.
        'train': ['matplotlib', 'tensorboard'],
        # pyarrow reads and writes the tables of a LeRobot data set, av its videos.
        'lerobot': ['pyarrow', 'av'],
        # `evaluate replay --ray`: recordings spread over many machines.
        'ray': ['ray'],
        # setuptools ignores tests_require: colcon finds pytest here. mcap reads back what a replay
        # writes; playwright drives Debian's chromium, in which the report is tried.
        'test': ['pytest', 'pytest-timeout', 'pytest-xdist', 'hypothesis', 'ruff',
                 'colcon-common-extensions', 'mcap', 'playwright'],
    },
    maintainer='The meanflow_ros maintainers',
    maintainer_email='maintainers@meanflow-ros.dev',
    description='One-step vision-language robot policies for ROS 2.',
    license='Apache-2.0',
    entry_points={
        'console_scripts': [
            'policy_node = meanflow_ros.ros.starting:policy_node',
            'sim_node = meanflow_ros.ros.starting:sim_node',
            'bench = meanflow_ros.evaluation.bench.command:main',
            'benchmark = meanflow_ros.evaluation.benchmark:main',
            'export_lerobot = meanflow_ros.training.export_lerobot:main',
            'train = meanflow_ros.training.train:main',
            'evaluate = meanflow_ros.evaluation.evaluate:main',
            'replay = meanflow_ros.evaluation.replay.command:main',
            'demo = meanflow_ros.evaluation.demo:main',
            'record_demonstrations = meanflow_ros.sim.demonstrations:main',
        ],
    },
)
