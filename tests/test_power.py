"""Rails, tegrastats and power modes, from texts in the formats that Jetsons write.

The lines and trees below have the form of published recordings (issues of jetson_stats and
others); they have not been recorded by this project, which has not run on a Jetson yet.
"""

from __future__ import annotations

import stat
import time

import pytest

from edgert.bench.power import (
    Meter,
    energy,
    find_meter,
    find_rails,
    parse_nvpmodel,
    parse_tegrastats,
    power_mode,
    report,
    throttle_events,
)

ORIN_NANO_JP5 = (
    "RAM 2448/7620MB (lfb 4x4MB) SWAP 0/3810MB (cached 0MB) "
    "CPU [4%@729,0%@729,0%@729,1%@729,off,off] EMC_FREQ 0%@2133 GR3D_FREQ 0%@305 NVDEC off "
    "CV0@-256C CPU@46.5C SOC2@45.1C SOC0@44.9C GPU@45.6C tj@46.5C SOC1@45.3C "
    "VDD_IN 4947mW/4947mW VDD_CPU_GPU_CV 1162mW/1162mW VDD_SOC 1493mW/1493mW"
)
ORIN_NANO_JP6 = (
    "11-14-2024 22:54:33 RAM 4300/7620MB (lfb 4x4MB) SWAP 3812/3810MB (cached 3MB) "
    "CPU [12%@1510,8%@1510,9%@1510,8%@1510,17%@729,11%@729] GR3D_FREQ 0% cpu@50.25C soc2@48.9C "
    "soc0@50.0C gpu@50.2C tj@50.25C soc1@49.1C "
    "VDD_IN 4569mW/4569mW VDD_CPU_GPU_CV 804mW/804mW VDD_SOC 1367mW/1367mW"
)
AGX_ORIN_JP7 = (
    "07-25-2026 09:08:28 RAM 20642/62817MB (lfb 1x2MB) CPU [23%@2201,10%@2201] EMC_FREQ 3%@3199 "
    "GR3D_FREQ 0%@[1300,1301] NVENC0 off NVDEC0 off APE 174 cpu@52.968C/52.968C "
    "VDD_GPU_SOC 3205mW/3205mW VDD_CPU_CV 801mW/801mW VIN_SYS_5V0 4144mW/4144mW"
)
THOR_JP7 = "RAM 1/2MB GR3D_FREQ @[1000,1000,1000] gpu@40C"
NANO_JP4 = (
    "RAM 1903/3964MB (lfb 117x4MB) SWAP 0/1982MB (cached 0MB) IRAM 0/252kB(lfb 252kB) "
    "CPU [10%@1479,off,off,3%@1479] EMC_FREQ 0% GR3D_FREQ 12% PLL@28C CPU@31.5C PMIC@100C "
    "thermal@30.25C POM_5V_IN 2000/2000 POM_5V_GPU 0/0 POM_5V_CPU 124/124"
)


@pytest.mark.parametrize(
    ("line", "rails"),
    [
        (ORIN_NANO_JP5, {"VDD_IN": 4947, "VDD_CPU_GPU_CV": 1162, "VDD_SOC": 1493}),
        (ORIN_NANO_JP6, {"VDD_IN": 4569, "VDD_CPU_GPU_CV": 804, "VDD_SOC": 1367}),
        (AGX_ORIN_JP7, {"VDD_GPU_SOC": 3205, "VDD_CPU_CV": 801, "VIN_SYS_5V0": 4144}),
        (NANO_JP4, {"POM_5V_IN": 2000, "POM_5V_GPU": 0, "POM_5V_CPU": 124}),
        (THOR_JP7, {}),
    ],
    ids=["orin-nano-jp5", "orin-nano-jp6", "agx-orin-jp7", "nano-jp4", "thor-jp7"],
)
def test_rails_of_tegrastats_are_the_values_of_the_moment(line, rails):
    """With the unit or without; RAM and SWAP have a slash too and are no rails."""
    assert parse_tegrastats(line).rails == rails


@pytest.mark.parametrize(
    ("line", "percent", "mhz"),
    [
        (ORIN_NANO_JP5, 0, 305),
        (ORIN_NANO_JP6, 0, None),
        (AGX_ORIN_JP7, 0, 1300),
        (THOR_JP7, None, 1000),
        (NANO_JP4, 12, None),
    ],
)
def test_the_gpu_is_written_in_four_ways(line, percent, mhz):
    """A load that the line does not have is unknown, not zero."""
    found = parse_tegrastats(line)
    assert (found.gpu_percent, found.gpu_mhz) == (percent, mhz)


def test_memory_and_temperatures_of_tegrastats():
    """A sensor that is switched off reads -256 °C: it is left out."""
    found = parse_tegrastats(ORIN_NANO_JP5)
    assert (found.ram_used_mb, found.ram_total_mb) == (2448, 7620)
    assert found.temp_c == {
        **{"CPU": 46.5, "SOC2": 45.1, "SOC0": 44.9, "GPU": 45.6, "tj": 46.5, "SOC1": 45.3}
    }
    assert parse_tegrastats(AGX_ORIN_JP7).temp_c == {"cpu": 52.968}


@pytest.mark.parametrize("line", ["", "\n", "tegrastats: not found", "VDD_IN mW", "\0\xff VDD_IN"])
def test_other_lines_say_nothing(line):
    found = parse_tegrastats(line)
    assert (found.rails, found.temp_c, found.ram_used_mb, found.gpu_percent) == ({}, {}, None, None)


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("NV Power Mode: 15W\n0\n", ("15W", 0)),
        ("NV Fan Mode:quiet\nNV Power Mode: MODE_15W_6CORE\n2\n", ("MODE_15W_6CORE", 2)),
        ("NVPM VERB: Current mode: NV Power Mode: MAXN\r\n0\r\n", ("MAXN", 0)),
        ("NV Power Mode: MAXN", ("MAXN", None)),
        ("NV Power Mode: MAXN\nPARAM 3\n", ("MAXN", None)),
        ("nvpmodel: command not found", None),
        ("", None),
    ],
)
def test_power_modes(text, mode):
    assert parse_nvpmodel(text) == mode


@pytest.fixture
def hwmon(tmp_path):
    """An Orin Nano's INA3221 in the kernel's form, beside a fan."""
    root = tmp_path / "hwmon"
    sensor = root / "hwmon1"
    files = {
        "name": "ina3221",
        **{"in1_label": "VDD_IN", "in1_input": "4984", "curr1_input": "960"},
        **{"in2_label": "VDD_CPU_GPU_CV", "in2_input": "4976", "curr2_input": "120"},
        **{"in3_label": "VDD_SOC", "in3_input": "4976", "curr3_input": "304"},
        **{"in4_input": "280", "in7_label": "sum of shunt voltages", "in7_input": "8080"},
        "curr4_input": "1384",
    }
    sensor.mkdir(parents=True)
    for name, text in files.items():
        (sensor / name).write_text(text + "\n")
    fan = root / "hwmon0"
    fan.mkdir()
    (fan / "name").write_text("pwmfan\n")
    return root


def test_rails_are_voltage_times_current(hwmon):
    """4.984 V and 960 mA are 4785 mW; the sum of shunt voltages is no rail."""
    found = {rail.label: rail.read() for rail in find_rails(hwmon)}
    assert found == pytest.approx(
        {"VDD_IN": 4784.64, "VDD_CPU_GPU_CV": 597.12, "VDD_SOC": 1512.704}
    )


def test_channels_that_are_not_connected_are_left_out(hwmon):
    """As is one whose current cannot be read, and a seventh channel that has one."""
    sensor = hwmon / "hwmon1"
    (sensor / "in2_label").write_text("NC\n")
    (sensor / "curr3_input").unlink()
    (sensor / "curr7_input").write_text("1\n")
    assert [rail.label for rail in find_rails(hwmon)] == ["VDD_IN"]


def test_two_sensors_give_all_their_rails(hwmon):
    """An AGX board has two of them."""
    other = hwmon / "hwmon2"
    other.mkdir()
    for name, text in {
        **{"name": "ina3221", "in1_label": "VDDQ", "in1_input": "5000", "curr1_input": "1"}
    }.items():
        (other / name).write_text(text)
    assert [rail.label for rail in find_rails(hwmon)][-1] == "VDDQ"


def test_a_machine_without_rails_has_no_meter(tmp_path, monkeypatch):
    """And no power: everything is None, nothing is zero."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_meter(tmp_path) is None
    assert find_rails(tmp_path / "none") == []
    assert throttle_events(tmp_path) is None
    assert power_mode() is None
    assert set(report(None, [(0, 1)], 5).values()) == {None}


def test_a_meter_covers_what_lies_between_start_and_stop(hwmon):
    """So the energy of a window is there however short it is."""
    meter = find_meter(hwmon)
    assert meter is not None
    meter.start()
    begin = time.perf_counter_ns()
    end = begin + 1_000
    while time.perf_counter_ns() < end:
        pass
    meter.stop()
    found = report(meter, [(begin, end)], 10)
    assert found["power_source"] == "INA3221 (hwmon)"
    assert found["rail"] == "VDD_IN"
    assert found["rails"]["VDD_SOC"]["mean_mw"] == pytest.approx(1512.704)
    assert found["energy_j"] == pytest.approx(4.78464e-6)
    assert found["tok_per_j"] == pytest.approx(10 / 4.78464e-6)


def test_a_board_without_a_total_rail_has_parts_only(hwmon):
    """An AGX Orin: its rails are shown, and no sum is made up."""
    (hwmon / "hwmon1" / "in1_label").write_text("VDD_GPU_SOC\n")
    meter = find_meter(hwmon)
    assert meter is not None
    meter.start()
    begin = time.perf_counter_ns()
    meter.stop()
    found = report(meter, [(begin, begin + 1)], 10)
    assert set(found["rails"]) == {"VDD_GPU_SOC", "VDD_CPU_GPU_CV", "VDD_SOC"}
    assert (found["rail"], found["energy_j"], found["tok_per_j"]) == (None, None, None)


def test_energy_is_the_area_under_the_line():
    """Power rises from 1 W to 3 W within two seconds: 2 J in the half around the middle... twice
    a second at 2 W on average."""
    samples = [(0, {"VDD_IN": 1000.0}), (2_000_000_000, {"VDD_IN": 3000.0})]
    found = energy(samples, [(500_000_000, 1_500_000_000)])
    assert found == {"VDD_IN": pytest.approx({"energy_j": 2.0, "mean_mw": 2000.0})}
    halves = energy(samples, [(0, 1_000_000_000), (1_000_000_000, 2_000_000_000)])
    assert halves == {"VDD_IN": pytest.approx({"energy_j": 4.0, "mean_mw": 2000.0})}


@pytest.mark.parametrize(
    ("samples", "windows"),
    [
        ([], [(0, 1)]),
        ([(0, {"A": 1.0})], [(0, 0)]),
        ([(0, {"A": 1.0}), (10, {"A": 1.0})], []),
        ([(0, {"A": 1.0}), (10, {"A": 1.0})], [(5, 11)]),
        ([(1, {"A": 1.0}), (10, {"A": 1.0})], [(0, 5)]),
        ([(0, {"A": 1.0}), (10, {"A": 1.0})], [(5, 5)]),
        ([(0, {"A": 1.0}), (10, {"B": 1.0})], [(2, 5)]),
    ],
    ids=["none", "one", "no window", "after", "before", "empty", "rail lost"],
)
def test_nothing_is_extrapolated(samples, windows):
    """Samples that do not reach over all windows give no energy."""
    assert energy(samples, windows) is None


def test_throttle_events_are_summed(hwmon):
    (hwmon / "hwmon0" / "oc1_event_cnt").write_text("2\n")
    (hwmon / "hwmon0" / "oc2_event_cnt").write_text("1\n")
    assert throttle_events(hwmon) == 3


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A function that puts a shell script of this name first on the PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def install(name, script):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return install


def test_where_only_tegrastats_knows_it_is_read_line_by_line(tmp_path, tools):
    """Its process is gone when the meter stops."""
    tools("tegrastats", f'while :; do echo "{NANO_JP4}"; sleep 0.01; done')
    meter = find_meter(tmp_path)
    assert meter is not None
    meter.start()
    begin = time.perf_counter_ns()
    time.sleep(0.05)
    end = time.perf_counter_ns()
    meter.stop()
    found = report(meter, [(begin, end)], 4)
    assert found["power_source"] == "tegrastats"
    assert found["rail"] == "POM_5V_IN"
    assert found["rails"]["POM_5V_IN"]["mean_mw"] == pytest.approx(2000)
    assert found["energy_j"] == pytest.approx(2.0 * (end - begin) / 1e9)


def test_a_tegrastats_that_says_nothing_measures_nothing(tmp_path, tools):
    tools("tegrastats", "exit 1")
    meter = find_meter(tmp_path)
    assert isinstance(meter, Meter)
    meter.start()
    meter.stop()
    assert set(report(meter, [(0, 1)], 4).values()) == {None}


def test_the_power_mode_is_asked_for(tools):
    tools("nvpmodel", 'echo "NV Power Mode: 7W"; echo 1')
    assert power_mode() == "7W"


def test_a_bench_measures_the_rails_it_is_shown(hwmon):
    """All timed requests lie within the samples."""
    from fake_model import fake_model

    from edgert.bench.plan import Plan, make_work
    from edgert.bench.run import time_requests

    (hwmon / "hwmon0" / "oc1_event_cnt").write_text("0\n")
    model = fake_model()
    work = make_work(Plan(n_prompt=8, n_gen=4, repeats=2), model.manifest, model.tokenizer)
    power = time_requests(model, work, hwmon=hwmon).power
    assert power["rail"] == "VDD_IN"
    assert power["energy_j"] > 0
    assert power["throttled"] is False
