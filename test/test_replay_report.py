"""report.html in a real browser, and what the page holds without one."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from made_bags import MS, ROBOT, T0, simple_bag
from replay_rig import Fake, offsets, replay

from meanflow_ros.evaluation.replay import pages
from meanflow_ros.evaluation.replay.comparison import difference
from meanflow_ros.evaluation.replay.pages import write_report
from meanflow_ros.evaluation.replay.running import Replayed
from meanflow_ros.evaluation.report import write_page

RATES = dataclasses.replace(ROBOT, action_space=dataclasses.replace(
    ROBOT.action_space, rates=('base', 'elbow')))
HOSTILE = '</script><script>document.title="broken"</script><img src=x onerror="throw 1">'
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser',
                                                'google-chrome'))), None)


@pytest.fixture(scope='module')
def report(tmp_path_factory):
    """Return report.html of two episodes with known errors, late steps and probes."""
    folder = tmp_path_factory.mktemp('report')
    simple_bag(folder / 'bag', episodes=2, length_ns=1200 * MS, camera_ns=40 * MS, delay_ns=0)
    document, episodes, _ = replay(
        folder / 'bag', Fake(RATES, error=offsets(0.01, 0.02, 0.04, 0.08, 0.16)), latency_ms=55,
        probe_every_s=0.2, swapped_instruction='something else')
    document['episodes'][0]['instructions'] = [HOSTILE]
    episodes[0].instructions = (HOSTILE,)
    document['recordings'][0]['lost'] = [HOSTILE]
    write_report(folder / 'report.html', document, episodes, lambda index: episodes[index])
    return folder / 'report.html'


def content(report) -> dict:
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>',
                     report.read_text(), re.DOTALL)[1]
    return json.loads(text)


def test_the_page_is_one_file_that_asks_for_nothing_else(report):
    text = report.read_text()
    assert not re.search(r'(src|href)="(?!#|data:)[^"]', text)
    assert 'https:' not in text and '<link rel="stylesheet"' not in text
    assert "default-src 'none'" in text


def test_pictures_and_points_are_bounded_however_long_the_recording(report, tmp_path, monkeypatch):
    for name, value in (('MOST_POINTS', 20), ('MOST_PICTURES', 24), ('MOST_EPISODES', 2)):
        monkeypatch.setattr(pages, name, value)
    simple_bag(tmp_path / 'bag', episodes=3, length_ns=1200 * MS, camera_ns=40 * MS)
    document, episodes, _ = replay(tmp_path / 'bag', Fake(error=offsets(0, 0, 0.3, 0.3, 0.3)))
    write_report(tmp_path / 'r.html', document, episodes, lambda index: episodes[index])
    data = content(tmp_path / 'r.html')
    assert len(data['episodes']) == 2
    for each in data['episodes']:
        assert len(each['t']) <= 20 and len(each['frames']['t']) <= 6
    strips = sum(len(strip) for each in data['worst'] for strip in each['cameras'].values())
    assert len(data['media']) <= 24 + strips


def test_the_worst_moments_are_where_the_errors_are(tmp_path):
    simple_bag(tmp_path / 'bag', episodes=1, length_ns=1200 * MS, camera_ns=40 * MS, delay_ns=0)

    def error(observation, seed, steps):
        late = (observation.stamp_ns - T0) // MS
        return np.array([0.0, 0.5 * (late == 600), 0.0])

    document, episodes, _ = replay(tmp_path / 'bag', Fake(error=error))
    write_report(tmp_path / 'r.html', document, episodes, lambda index: episodes[index])
    (moment,) = content(tmp_path / 'r.html')['worst']
    assert moment['dimension'] == 'elbow' and moment['t'] == pytest.approx(0.62)
    assert moment['executed'] - moment['recorded'] == pytest.approx(0.5)
    assert moment['times'][moment['here']] == pytest.approx(0.6)
    assert len(moment['cameras']['wrist']) == 5


# In a browser


@pytest.fixture(scope='module')
def browser():
    """Return a headless Chromium."""
    sync_api = pytest.importorskip(
        'playwright.sync_api', reason='playwright is missing: pip install playwright')
    if CHROMIUM is None:
        pytest.skip('there is no chromium: apt-get install chromium')
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, report):
    """Return a function that opens the report; whatever the page complains of fails the test."""
    complaints, contexts = [], []

    def opened_at(width: int = 1280, path=report, **options):
        contexts.append(browser.new_context(viewport={'width': width, 'height': 800},
                                            offline=True, **options))
        page = contexts[-1].new_page()
        page.on('console', lambda message: complaints.append(message.text)
                if message.type in ('error', 'warning') else None)
        page.on('pageerror', lambda error: complaints.append(str(error)))
        page.on('request', lambda request: complaints.append(request.url)
                if not request.url.startswith(('file:', 'data:')) else None)
        page.goto(path.as_uri())
        page.wait_for_selector('html[data-ready=yes]', timeout=20_000)
        return page

    yield opened_at
    for context in contexts:
        context.close()
    assert complaints == []


def drawn_paths(page, selector: str) -> int:
    """Return how many lines with more than two points are drawn there."""
    return page.evaluate("""selector => [...document.querySelectorAll(selector + ' path.line')]
        .filter(each => (each.getAttribute('d').match(/L/g) || []).length > 1
                && each.getBoundingClientRect().width > 20).length""", selector)


def test_the_page_opens_offline_with_every_plot_and_without_a_complaint(opened):
    page = opened()
    assert 'A check of the replay itself' in page.inner_text('h1')
    assert page.locator('.findings li.stop').count() >= 1
    assert drawn_paths(page, '#horizon-plots') == 3 * 4        # three dimensions, four lines each
    assert drawn_paths(page, '#timeline') >= 3 * 2
    assert page.locator('#timing rect.bar').count() > 20
    shown = page.inner_text('#error')
    assert all(f'gripper: {who}' in shown for who in ('policy', 'repeat the last action'))
    assert 'Direction of motion' in shown and 'over base, elbow' in shown
    assert page.locator('#probe-plots rect.bar').count() >= 8
    assert page.locator('#worst .moment').count() >= 2
    assert page.evaluate('[...document.images].every(each => each.complete && each.naturalWidth)')
    names = page.locator('#contents a').all_inner_texts()
    assert names[:4] == ['Verdict', 'Error', 'Timelines', 'Worst moments']


def test_text_from_recordings_stays_text(opened):
    page = opened()
    assert page.title() == 'Replay report'
    assert page.locator('img[src=x]').count() == 0
    assert HOSTILE in page.inner_text('#recordings')


def test_the_timeline_is_walked_by_keyboard_with_its_pictures(opened):
    page = opened()
    slider = page.locator('[role=slider]')
    slider.focus()
    def now():
        return int(slider.get_attribute('aria-valuenow'))

    page.keyboard.press('ArrowRight')
    assert now() == 1
    page.keyboard.press('Shift+ArrowRight')
    assert now() == 11
    picture = page.locator('#timeline img').first
    before = picture.get_attribute('src')
    page.keyboard.press('End')
    assert now() == int(slider.get_attribute('aria-valuemax')) > 50
    assert picture.get_attribute('src') != before
    page.keyboard.press('Home')
    assert now() == 0 and 'nothing due' in page.inner_text('#timeline')
    page.keyboard.press('PageDown')
    assert page.locator('#timeline select').evaluate('each => each.selectedIndex') == 1
    page.locator('#worst button').first.click()
    assert now() > 0 and slider.evaluate('each => document.activeElement === each')


def test_the_cursor_follows_the_pointer(opened):
    page = opened()
    plot = page.locator('#timeline svg').first
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    page.mouse.move(box['x'] + box['width'] * 0.6, box['y'] + box['height'] / 2)
    share = int(page.locator('[role=slider]').get_attribute('aria-valuenow')) / int(
        page.locator('[role=slider]').get_attribute('aria-valuemax'))
    assert 0.45 < share < 0.65


@pytest.fixture
def closed_loop(tmp_path, monkeypatch):
    """Return the report of a closed loop whose episodes were made up."""
    sim_report = pytest.importorskip('meanflow_ros.evaluation.sim_report',
                                     reason="av is missing: pip install 'meanflow_ros[sim]'")
    from meanflow_ros.evaluation.episodes import EpisodeResult
    results = [EpisodeResult(
        task=task, seed=seed, instruction=f'do {task}', success=seed > 1 - number, steps=40,
        starved_steps=3 * number, chunks=9, latency_p50_ms=7.5, latency_p99_ms=float('nan'))
        for number, task in enumerate(('push', 'pull')) for seed in range(4)]
    asked = []

    def run_episode(filming, robot, job, *, camera_every):
        asked.append(job)
        for step in range(20):
            picture = np.full((48, 64, 3), 12 * step, np.uint8)
            filming([SimpleNamespace(images={'front': picture})], [0])
        return next(each for each in results if (each.task, each.seed) == job)

    monkeypatch.setattr(sim_report, 'run_episode', run_episode)
    monkeypatch.setattr(sim_report, 'MetaWorldRobot', lambda **size: SimpleNamespace(
        close=lambda: None))

    class Act:
        robot = SimpleNamespace(cameras=[SimpleNamespace(width=64, height=48)],
                                camera_names=('front',))

        def __call__(self, observations, seeds):
            return []

    sim_report.write_sim_report(
        tmp_path / 'sim.html', results, lambda result: (result.task, result.seed), Act(),
        checkpoint='somewhere', settings={}, videos=2, camera_every=4)
    assert asked == [('push', 0), ('push', 1), ('pull', 0), ('pull', 1)]
    return tmp_path / 'sim.html'


def test_a_closed_loop_has_success_per_task_and_videos_failures_first(opened, closed_loop):
    page = opened(path=closed_loop)
    assert page.inner_text('h1') == '62% of the episodes succeed.'
    assert 'For 12 of 320 control steps no action was due' in page.inner_text('#verdict')
    assert page.locator('#success-plots rect.bar').count() == 2
    assert '2/4' in page.inner_text('#success') and '3/4' in page.inner_text('#success')
    titles = page.locator('#videos figcaption').all_inner_texts()
    assert [title[0] for title in titles] == ['×', '×', '×', '✓']
    page.wait_for_function("""[...document.querySelectorAll("video")].every(
        each => each.readyState >= 1 && each.videoWidth === 176 && each.duration > 1.9)""",
                           timeout=10_000)


def test_a_comparison_shows_the_difference_of_every_dimension(opened, tmp_path):
    simple_bag(tmp_path / 'bag', episodes=3, length_ns=200 * MS, camera_ns=40 * MS, delay_ns=0)
    both = []
    for size in (0.02, 0.05):
        document, episodes, _ = replay(tmp_path / 'bag', Fake(error=offsets(*[size] * 5)))
        both.append(Replayed(document, episodes, interrupted=False))
    write_page(tmp_path / 'c.html', 'Replay comparison', {
        'kind': 'comparison', 'media': [], 'document': difference(*both, ['one', 'four'])})
    page = opened(path=tmp_path / 'c.html')
    assert 'A is nearer to the recordings than B' in page.inner_text('h1')
    assert page.locator('#difference-plots rect.bar').count() == 4
    rows = page.locator('#difference tbody tr').all_inner_texts()
    assert rows[1].split('\t')[:4] == ['base, rad', '0.02', '0.05', '0.03']
    shares = page.locator('#shares tbody tr').all_inner_texts()
    assert [row.split('\t')[0] for row in shares] == [
        'steps without an action', 'executed steps that were stale',
        'chunks that the guard refused']


def test_it_fits_a_phone_and_dark_is_dark(opened):
    page = opened(390, color_scheme='dark', has_touch=True)
    assert page.evaluate('document.documentElement.scrollWidth') == 390
    page.locator('#timeline svg').first.scroll_into_view_if_needed()
    box = page.locator('#timeline svg').first.bounding_box()
    assert box['width'] > 300
    page.touchscreen.tap(box['x'] + box['width'] * 0.8, box['y'] + 40)
    assert int(page.locator('[role=slider]').get_attribute('aria-valuenow')) > 10

    def brightness():
        colour = page.evaluate('getComputedStyle(document.body).backgroundColor')
        return sum(map(int, re.findall(r'\d+', colour)[:3]))

    assert brightness() < 120
    page.click('#theme')
    assert brightness() > 600
