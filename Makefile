# `make demo` and `make test` set up all that they need, in .venv, and then run.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.SILENT:
.DEFAULT_GOAL := help
.PHONY: help setup mesa browser demo test faults soak clean

# A sourced ROS 2 is used; without one, ROS 2 Jazzy comes as wheels.
PATH := $(subst $(CURDIR)/.venv/bin:,,$(PATH))
PYTHONS := python3 python3.13 python3.12 python3.11 python3.10
ROS_PYTHON := $(if $(ROS_DISTRO),$(shell for python in $(PYTHONS); do \
    "$$python" -c 'import rclpy' 2>/dev/null && echo "$$python" && break; done))
ifeq ($(ROS_PYTHON),)
ROS := wheels
EXTRAS := ros,sim,train,lerobot,test
unexport PYTHONPATH AMENT_PREFIX_PATH CMAKE_PREFIX_PATH COLCON_PREFIX_PATH ROS_DISTRO
else
ROS := $(ROS_DISTRO)
EXTRAS := sim,train,lerobot,test
PYTHONS := $(ROS_PYTHON)
endif

MINUTES ?= 60

TORCH := torch==2.13.0
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
MESA := libegl1 libgl1 libgl1-mesa-dri
PY := .venv/bin/python
READY := .venv/.ready-$(ROS)
COLCON := $(PY) -c 'import sys; from colcon_core.command import main; sys.exit(main())'
PIP := $(PY) -m pip --disable-pip-version-check install -qq --no-input --no-compile

# The wheels are unpacked without bytecode, which takes a minute for all of it: what is imported
# leaves its own.
unexport PYTHONDONTWRITEBYTECODE

# Runs of several people, or of one, must not hear each other.
export ROS_AUTOMATIC_DISCOVERY_RANGE ?= LOCALHOST
ifndef ROS_DOMAIN_ID
export ROS_DOMAIN_ID := $(shell echo $$((PPID % 101 + 1)))
endif

# install_packages NAME...: true where apt may be used and it worked.
define APT
may_install() { command -v apt-get >/dev/null && { [ "$$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }; }
as_root() { if [ "$$(id -u)" = 0 ]; then "$$@"; else sudo -n "$$@"; fi; }
install_packages() {
    may_install || return 1
    as_root apt-get update -qq >/dev/null 2>&1 || true
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$$@" >/dev/null
}
endef

help:
	cat <<'EOF'
	make demo    set up, then run the shipped policy in simulation; results in demo_out/
	make test    set up, then ruff, colcon build and colcon test
	make faults  set up, then every fault on a graph of processes; into docs/reliability.md
	make soak    set up, then an hour of faults drawn at random; MINUTES=5 for less
	make setup   only set up: .venv with ROS 2, PyTorch and the rest
	make clean   remove .venv and all that was built
	EOF

demo: setup
	$(PY) -m meanflow_ros.evaluation.demo --out demo_out

test: setup browser
	$(PY) -m ruff check
	mkdir -p log
	$(COLCON) build --packages-select meanflow_ros --event-handlers console_direct-
	status=0
	# Processes wait for each other in some tests; a busy machine may keep one of them for too long.
	$(COLCON) test --packages-select meanflow_ros --event-handlers console_direct+ \
	    --return-code-on-test-failure --retest-until-pass 2 \
	    --pytest-args -ra -n 2 --dist loadfile --timeout 240 2>&1 | tee log/test.txt || status=$$?
	closing=$$(grep -aE '^=+ .*[0-9]+ (passed|failed|skipped|errors?).* in ' log/test.txt | tail -n 1 | sed 's/^=* //; s/ =*$$//') || true
	echo "$${closing:-no test ran}"
	[ -n "$$closing" ] && exit $$status || exit 1

faults: setup
	status=0; $(PY) test/reliability/campaign.py --out docs/data/reliability.json || status=$$?
	$(PY) test/reliability/report.py && exit $$status

soak: setup
	status=0; $(PY) test/reliability/soak.py --minutes $(MINUTES) --out docs/data/soak.json --plot docs/soak.png || status=$$?
	$(PY) test/reliability/report.py && exit $$status

setup: $(READY) mesa

# The marker is written last, so that whatever an interruption leaves is thrown away next time.
$(READY): setup.py Makefile
	$(APT)
	if [ -e $@ ]; then rm $@; else rm -rf .venv; fi
	if [ ! -e .venv ]; then
	    echo 'set-up 1/4: virtual environment'
	    for python in $(PYTHONS) ''; do
	        "$$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && break
	    done
	    if [ -z "$$python" ]; then
	        echo 'Python 3.10 to 3.13 is needed and none was found on PATH: install python3.12' >&2
	        exit 1
	    fi
	    if ! "$$python" -c 'import ensurepip' 2>/dev/null; then
	        venv=$$("$$python" -c 'import sys; print("python3.%d-venv" % sys.version_info[1])')
	        install_packages "$$venv" || { echo "install the package $$venv, then try again" >&2; exit 1; }
	    fi
	    "$$python" -m venv $(if $(ROS_PYTHON),--system-site-packages) .venv
	    $(PIP) --upgrade 'pip>=25'  # older ones lose their way among the versions for Python 3.10
	fi
	# ROS 2's own modules are compiled for the NumPy of the system.
	printf '%s\n' $(if $(ROS_PYTHON),"$$($(PY) -c 'import numpy; print("numpy<2" if numpy.__version__ < "2" else "")')") >.venv/constraints.txt
	index=
	if ! command -v nvidia-smi >/dev/null && timeout 4 $(PY) -c \
	    'from urllib.request import urlopen; urlopen("$(TORCH_CPU_INDEX)/torch/", timeout=3)' 2>/dev/null; then
	    index='--extra-index-url $(TORCH_CPU_INDEX)'
	fi
	echo 'set-up 2/4: PyTorch'
	$(PIP) -c .venv/constraints.txt $$index $(TORCH) 'setuptools>=77,<80'
	echo 'set-up 3/4: ROS 2 ($(ROS)), simulator and test tools'
	$(PIP) -c .venv/constraints.txt --no-build-isolation --editable '.[$(EXTRAS)]'
	touch $@

mesa:
	$(APT)
	if dpkg -s $(MESA) >/dev/null 2>&1; then exit 0; fi
	if ! command -v dpkg >/dev/null; then exit 0; fi
	echo 'set-up 4/4: Mesa, which draws the camera images'
	install_packages $(MESA) || echo 'no camera images can be drawn until these packages are installed: $(MESA)' >&2

# In which the report of a replay is tried; without one those tests are skipped.
browser:
	$(APT)
	if command -v chromium chromium-browser google-chrome >/dev/null || ! command -v dpkg >/dev/null; then exit 0; fi
	if grep -qs '^ID=debian' /etc/os-release; then install_packages chromium || true; fi

clean:
	rm -rf .venv build install log demo_out *.egg-info .pytest_cache .ruff_cache .hypothesis
