// The sections of the report, from the data that stands in the page.
const data = JSON.parse(document.getElementById('data').textContent);
const main = document.getElementById('main');
const BASELINES = {repeat_last: ['repeat the last action', 'var(--a)'], mean_action: ['the mean action', 'var(--b)'],
  nearest_neighbour: ['nearest recorded pose', 'var(--c)']};

function section(id, title, note, ...children) {
  const made = element('section', {id, 'aria-labelledby': `${id}-title`}, element('h2', {id: `${id}-title`}, title),
    note ? element('p', {class: 'note'}, note) : '', children);
  main.append(made);
  document.getElementById('contents').append(element('a', {href: `#${id}`}, title));
  return made;
}

const figure = (title, svg) => element('figure', {}, element('figcaption', {}, element('b', {}, title)), svg);
const legend = entries => element('ul', {class: 'legend'}, entries.map(([name, colour, dashed]) =>
  element('li', {}, element('i', {style: `border-color:${colour}`, class: dashed ? 'dashed' : null}), name)));
const table = (head, rows) => element('div', {class: 'scroll', tabindex: 0}, element('table', {},
  element('thead', {}, element('tr', {}, head.map((cell, index) => element('th', {scope: 'col', class: rows.length && rows[0][index] instanceof Node ? 'wrap' : null}, cell)))),
  element('tbody', {}, rows.map(row => element('tr', {}, row.map(cell => element('td', {class: cell instanceof Node ? 'wrap' : null}, cell)))))));
const pairs = entries => element('dl', {}, entries.filter(([, value]) => value !== '' && value !== null && value !== undefined)
  .flatMap(([name, value]) => [element('dt', {}, name), element('dd', {}, String(value))]));
const fixed = value => finite(value) ? value.toFixed(2) : '–';
const seconds = value => finite(value) ? `${round(value)} s` : '–';

function verdict(found, kind, subtitle) {
  const level = found.level, marks = {stop: '×', look: '!', good: '✓'};
  main.append(element('section', {class: `verdict ${level}`, id: 'verdict', 'aria-labelledby': 'verdict-title'},
    element('p', {class: 'soft'}, subtitle), element('h1', {id: 'verdict-title'}, found.headline),
    element('ul', {class: 'findings'}, found.findings.map(each => element('li', {class: each.level},
      element('span', {class: 'mark', role: 'img', 'aria-label': each.level}, marks[each.level]),
      element('span', {}, each.text, each.rests_on ? element('code', {}, `rests on ${each.rests_on}`) : '')))),
    element('p', {class: 'note'}, `${found.limits} What a sentence rests on are the names in ${kind === 'closed_loop' ? 'the JSON file' : 'metrics.json'}.`)));
  document.getElementById('contents').append(element('a', {href: '#verdict'}, 'Verdict'));
}

const tiles = entries => main.append(element('div', {class: 'tiles'}, entries.map(([value, text]) =>
  element('div', {class: 'tile'}, element('b', {}, value), element('span', {}, text)))));

function replay(found) {
  const policy = found.policy, counts = found.counts;
  verdict(found.verdict, 'replay', `${policy.kind === 'recorded' ? 'The recorded commands' : policy.checkpoint} on ${policy.robot}: `
    + `${counts.episodes} episodes, ${round(counts.seconds)} s, ${counts.observations} observations`);
  if (!found.executed) { recordings(found); environment(found); return; }
  const best = Object.entries(found.baselines).filter(([, each]) => each.relative_error && finite(each.relative_error.value))
    .sort((a, b) => a[1].relative_error.value - b[1].relative_error.value)[0];
  const error = found.relative_error;
  tiles([[fixed(error.value), `error of the first executed step; 1 is as far as recorded actions are from their mean${finite(error.low) ? ` (95 % ${fixed(error.low)} to ${fixed(error.high)})` : ''}`],
    best ? [fixed(best[1].relative_error.value), `the same for the best way to do without a policy: ${BASELINES[best[0]][0]}`] : ['–', 'no baseline'],
    [percent(found.deadline_misses.share), 'of the control steps without an action'],
    [percent(found.stale.share), 'executed though a newer observation had been taken'],
    [`${round(found.latency_ms.p50)} ms`, `latency; p99 ${round(found.latency_ms.p99)} ms (${found.latency_ms.source})`],
    [String(found.guard.rejected), `of ${found.guard.chunks} chunks refused by the guard`]]);
  horizon(found, policy);
  timelines(found);
  worst(found, policy);
  timing(found, policy);
  probes(found);
  inputs(found);
  episodes(found);
  environment(found);
}

function horizon(found, policy) {
  const steps = found.horizon.count.map((_, index) => (policy.first_step + index) * policy.period_s);
  const others = Object.entries(BASELINES).filter(([name]) => found.baselines[name].horizon);
  const plots = policy.dimensions.map(name => figure(`${name} ${unitText(policy.units[name])}`, lineChart({
    xs: steps, xName: 's ahead', label: `error of ${name} by step of the horizon`, lines: [
      {name: 'policy', colour: 'var(--policy)', values: found.horizon.mae[name]},
      ...others.map(([key, [words, colour]]) => ({name: words, colour, dashed: true, values: found.baselines[key].horizon.mae[name]}))]})));
  const head = ['', 'first step MAE', 'executed MAE', 'RMSE', 'p50', 'p90', 'p99', ...others.map(([, [words]]) => words)];
  const rows = policy.dimensions.map(name => [`${name}${unitText(policy.units[name]) ? `, ${policy.units[name]}` : ''}`,
    round(found.first_step_mae[name]), ...['mae', 'rmse', 'p50', 'p90', 'p99'].map(what => round(found.executed[what][name])),
    ...others.map(([key]) => round(found.baselines[key].first_step_mae[name]))]);
  const made = section('error', 'Error', 'Mean absolute error against the recorded action, by how far ahead a step lies, in the units of the action.',
    legend([['policy', 'var(--policy)'], ...others.map(([, [words, colour]]) => [words, colour, true])]),
    element('div', {class: 'plots', id: 'horizon-plots'}, plots), element('h3', {}, 'Per dimension'), table(head, rows));
  const why = Object.entries(found.baselines).filter(([, each]) => each.missing);
  if (why.length) made.append(element('p', {class: 'note'}, 'Left out: ', why.map(([name, each]) => `${BASELINES[name][0]} (${each.missing})`).join('; ')));
  const everyone = [['policy', found], ...others.map(([key, [words]]) => [words, found.baselines[key]])];
  const grippers = Object.entries(found.gripper).filter(([, each]) => !each.missing);
  if (grippers.length) made.append(element('h3', {}, 'Gripper'), table(['', 'open or closed agrees', 'switches', 'missed', 'extra', 'late p50', 'late p95'],
    grippers.flatMap(([name]) => everyone.map(([words, {gripper: {[name]: each}}]) =>
      [`${name}: ${words}`, percent(each.agreement), each.switches, each.missed, each.extra, seconds(each.late_s.p50), seconds(each.late_s.p95)]))));
  if (!found.direction.missing) made.append(element('h3', {}, 'Direction of motion'),
    element('p', {class: 'note'}, `The cosine with the recording, over ${found.direction.dimensions.join(', ')}: 1 is the same way, below 0 is against it.`),
    table(['', 'mean', 'a tenth of the steps is below', 'steps against', 'steps'], everyone.map(([words, {direction}]) =>
      direction.missing ? [words, '–', '–', '–', direction.missing] : [words, round(direction.mean, 2), round(direction.p10, 2), percent(direction.against), direction.steps])));
}

function timelines(found) {
  if (!data.episodes.length) return;
  const made = section('timeline', 'Timelines', `What was commanded and what the recording commanded at the same time${data.episodes.length < found.counts.episodes ? `; ${data.episodes.length} of ${found.counts.episodes} episodes` : ''}.`,
    legend([['executed', 'var(--policy)'], ['recorded', 'var(--recorded)'], ['chunk of the pictures shown', 'var(--a)', true], ['no action was due', 'var(--stop)']]));
  window.timeline = new Timeline(data, made);
}

function worst(found, policy) {
  if (!data.worst.length) return;
  section('worst', 'Worst moments', 'Where the first executed step of a chunk is farthest from the recording; the marked picture is the one the chunk was made from.',
    data.worst.map(each => element('div', {class: 'moment'},
      element('p', {}, element('b', {}, `${each.dimension} is off by ${round(Math.abs(each.executed - each.recorded))} ${unitText(policy.units[each.dimension])}`),
        `: ${round(each.executed)} where the recording has ${round(each.recorded)}. ${each.name}, ${each.t.toFixed(2)} s`, each.instruction ? `, “${each.instruction}”` : '', '. ',
        each.episode === null ? '' : element('button', {type: 'button', onclick: () => {
          window.timeline.show(each.episode, nearest(data.episodes[each.episode].t, each.t));
          document.getElementById('timeline').scrollIntoView(); window.timeline.plots.focus({preventScroll: true}); }}, 'in the timeline')),
      Object.entries(each.cameras).map(([camera, strip]) => element('div', {class: 'strip', tabindex: 0, role: 'group', 'aria-label': `camera ${camera}`},
        strip.map((media, index) => element('figure', {class: index === each.here ? 'here' : null},
          element('img', {src: 'data:image/jpeg;base64,' + data.media[media], alt: `${camera} at ${each.times[index].toFixed(2)} s`}),
          element('figcaption', {}, `${camera} ${each.times[index].toFixed(2)} s`))))))));
}

function timing(found, policy) {
  const plots = [['latency_ms', 'Latency of an inference', 'ms'], ['observation_age_s', 'Age of the observation when its action is executed', 's']]
    .filter(([key]) => data.histograms[key]).map(([key, title, unit]) => figure(title, histogram({...data.histograms[key], label: title, xName: unit})));
  const ran = Object.entries(found.latency_ms.runtime).map(([name, text]) => `${name}: ${text}`).join('; ');
  section('timing', 'Latency and staleness', `Latency: ${found.latency_ms.source}${ran ? ` (${ran})` : ''}. Execution: ${found.settings.execution}.`,
    element('div', {class: 'plots wide'}, plots),
    table(['', 'p50', 'p95', 'p99', 'max'], [['latency, ms', found.latency_ms], ['age at execution, s', found.observation_age_s]]
      .map(([name, each]) => [name, ...['p50', 'p95', 'p99', 'max'].map(what => round(each[what]))])),
    element('h3', {}, 'Smoothness'), element('p', {class: 'note'}, 'A seam is where another chunk takes over; its jump is how far the new chunk is from what the old one had for the same time.'),
    table(['', 'jump p50', 'p99', 'jump in velocity p50, /s', 'p99', 'jerk in a chunk p50, /s³', 'p99'], policy.dimensions.map(name => [name + (unitText(policy.units[name]) ? `, ${policy.units[name]}` : ''),
      ...[found.seams.jump, found.seams.velocity_jump, found.jerk].flatMap(each => [round(each[name].p50), round(each[name].p99)])])),
    pairs([['seams', found.seams.count], ['steps of chunks that expired', percent(found.expired.share)], ['first action after', seconds(found.start_s.p50)],
      ['chunks', `${found.guard.accepted} accepted, ${found.guard.rejected} refused, ${found.guard.discarded} discarded, ${found.guard.unfinished} unfinished`]]));
  guard(found);
}

function guard(found) {
  const kinds = Object.entries(found.guard.interventions), unknown = Object.entries(found.guard.not_checked);
  section('guard', 'The guard', `What it did to chunks, with ${found.guard.motion ? `the motion file ${found.guard.motion}` : 'no motion file'}. Robot description: ${[...new Set(found.recordings.map(each => each.urdf || 'none'))].join(', ')}.`,
    kinds.length ? table(['kind', 'times'], kinds) : element('p', {}, 'It never intervened.'),
    unknown.map(([kind, why]) => element('p', {class: 'note'}, `Not known from a recording: ${kind}: ${why}.`)));
}

function probes(found) {
  if (found.probes.missing) return;
  const made = section('probes', 'Does it look, does it listen?', `${found.counts.probed} observations were asked again with one input changed. Moved: how far the actions go; effect: what it adds to the error. In units of the recorded actions' own spread.`);
  const rows = Object.entries(found.probes);
  made.append(element('div', {class: 'plots wide', id: 'probe-plots'},
    figure('Moved', bars({label: 'how far the actions move', rows: rows.map(([name, each]) => ({name, value: each.moved, note: each.missing}))})),
    figure('Effect on the error', bars({label: 'effect on the error', rows: rows.map(([name, each]) => ({name, note: each.missing, colour: 'var(--a)', ...(each.effect || {})}))}))));
  if (!found.nfe.missing) made.append(element('h3', {}, 'Network evaluations (NFE) on the same noise'),
    table(['NFE', 'error', 'against NFE 1', '95 % interval'], Object.entries(found.nfe).filter(([key]) => key !== 'observations')
      .map(([key, each]) => [key, round(each.error), round(each.effect.value), finite(each.effect.low) ? `${round(each.effect.low)} to ${round(each.effect.high)}` : '–'])));
  if (!found.spread.missing) made.append(element('h3', {}, 'Is it sure where it is right?'),
    element('p', {class: 'note'}, `Spread over ${found.spread.seeds} draws of noise against the error: rank correlation ${round(found.spread.rank_correlation_with_error, 2)}; error ${round(found.spread.error_where_sure, 2)} where it is surest, ${round(found.spread.error_where_unsure, 2)} where it is least sure.`),
    element('div', {class: 'plots wide'}, figure('Error against spread', scatter({points: found.spread.points, label: 'error against spread', xName: 'spread'}))));
}

function inputs(found) {
  const causes = Object.entries(found.missing_input.causes);
  const made = section('inputs', 'Inputs', `Without a complete observation: ${seconds(found.missing_input.seconds)} (${percent(found.missing_input.share)}).`);
  if (causes.length) made.append(table(['what was missing', 'times', 'seconds'], causes.map(([name, each]) => [name, each.times, round(each.seconds)])));
  const places = [...Object.entries(found.drift.states).map(([name, each]) => [`state ${name}`, each]), ...Object.entries(found.drift.actions).map(([name, each]) => [`action ${name}`, each])];
  if (places.length) made.append(element('h3', {}, 'Against the training data'), element('p', {class: 'note'}, 'Place in the range of the training data: -1 at its low end, 1 at its high end.'),
    table(['', 'outside', 'centre', 'farthest'], places.map(([name, each]) => [name, percent(each.outside), round(each.centre), round(each.farthest)])));
  recordings(found);
}

function recordings(found) {
  const lost = found.recordings.flatMap(each => [...(each.error ? [[each.name, each.error]] : []), ...each.lost.map(what => [each.name, `lost: ${what}`]), ...each.skipped.map(([name, why]) => [name, `left out: ${why}`])]);
  section('recordings', 'Recordings', lost.length ? 'What could not be used, and why.' : 'All that was recorded could be used.',
    lost.length ? table(['recording', 'what'], lost.map(([name, what]) => [name, element('span', {}, what)])) : '',
    table(['recording', 'seconds', 'messages', 'written by'], found.recordings.map(each => [each.name, round(each.seconds), each.messages, each.distribution || '–'])));
}

function episodes(found) {
  section('episodes', 'Episodes', '', table(['episode', 'instruction', 'seconds', 'observations', 'error', 'missed'], found.episodes.map(each => [each.name,
    element('span', {}, each.instructions.join(' / ')), round(each.seconds), each.observations, round(each.relative_error, 2), each.deadline_misses])));
}

function environment(found) {
  const place = found.environment, settings = found.settings || {};
  section('environment', 'Environment', '', pairs([...Object.entries(place.versions), ['Python', place.python], ['system', `${place.system}, ${place.machine}, ${place.cores} cores`], ['GPU', place.gpu],
    ['NFE', settings.sampler_steps || 'the checkpoint’s own'], ['seed', settings.seed], ['execution', settings.execution], ['device', settings.device], ['dtype', settings.dtype], ['fingerprint of the settings', settings.fingerprint]]),
    element('details', {}, element('summary', {}, 'All settings'), element('div', {class: 'scroll', tabindex: 0}, element('pre', {}, element('code', {}, JSON.stringify(settings, null, 1))))));
}

function comparison(found) {
  verdict(found.verdict, 'comparison', `A: ${found.a.name}. B: ${found.b.name}. ${found.pairs} episodes, paired.`);
  const each = (what, name) => round(found[name][what]);
  const rows = Object.entries(found.differences).map(([name, row]) => ({name: name.replace('_', ' '), ...row}));
  const numbers = row => [round(row.a), round(row.b), round(row.difference.value), finite(row.difference.low) ? `${round(row.difference.low)} to ${round(row.difference.high)}` : '–'];
  section('difference', 'B less A', 'With 95 % bootstrap intervals over whole episodes; below 0, B is nearer to the recording. Relative: in units of the recorded actions’ own spread.',
    element('div', {id: 'difference-plots'}, bars({label: 'difference of the errors', rows: rows.map(row => ({name: row.name, ...row.relative, text: `${round(row.difference.value)} ${unitText(row.unit)}`,
      colour: row.relative.high < 0 ? 'var(--good)' : row.relative.low > 0 ? 'var(--stop)' : 'var(--soft)'}))})),
    table(['', 'A', 'B', 'B less A', '95 % interval'], rows.map(row => [row.name + (unitText(row.unit) ? `, ${row.unit}` : ''), ...numbers(row)])));
  const words = {missed: 'steps without an action', stale: 'executed steps that were stale', rejected: 'chunks that the guard refused'};
  section('shares', 'In time, and let pass', 'As shares, with intervals as above.', table(['', 'A', 'B', 'B less A', '95 % interval'], Object.entries(found.shares).map(([name, row]) => [words[name], ...numbers(row)])));
  section('both', 'Side by side', '', table(['', 'A', 'B'], [['relative error', 'relative_error'], ['latency p50, ms', 'latency_p50_ms'], ['latency p99, ms', 'latency_p99_ms']]
    .map(([words, key]) => [words, each(key, 'a'), each(key, 'b')]).concat([['verdict', element('span', {}, found.a.verdict), element('span', {}, found.b.verdict)]])), element('p', {class: 'note'}, 'The reports of A and B lie beside this one, in a/ and b/.'));
  environment(found);
}

function closedLoop(found) {
  verdict(found.verdict, 'closed_loop', `${found.checkpoint} in simulation: ${found.episodes.length} episodes`);
  section('success', 'Success per task', '95 % Wilson intervals.', element('div', {id: 'success-plots'}, bars({label: 'success per task', rows: Object.entries(found.summary).map(([name, each]) =>
    ({name, value: each.rate, low: each.low, high: each.high, text: `${each.successes}/${each.episodes}`}))})),
    table(['task', 'success', 'median steps', 'latency p50, ms'], Object.entries(found.summary).map(([name, each]) => [name, `${each.successes}/${each.episodes}`, round(each.steps), round(each.latency_p50_ms)])));
  if (data.videos.length) section('videos', 'Videos', '', element('div', {class: 'videos'}, data.videos.map(each => element('figure', {},
    element('video', {controls: '', muted: '', loop: '', playsinline: '', preload: 'metadata', src: 'data:video/mp4;base64,' + data.media[each.media], 'aria-label': each.title}),
    element('figcaption', {}, element('b', {}, each.success ? '✓ ' : '× '), each.title)))));
  section('all', 'Episodes', '', table(['task', 'seed', 'instruction', 'result', 'steps', 'starved', 'latency p50, ms'], found.episodes.map(each =>
    [each.task, each.seed, element('span', {}, each.instruction), each.success ? 'success' : 'failure', each.steps, each.starved_steps, round(each.latency_p50_ms)])));
  environment(found);
}

({replay, comparison, closed_loop: closedLoop})[data.kind](data.document);
document.getElementById('theme').addEventListener('click', () => {
  const root = document.documentElement, dark = root.dataset.theme ? root.dataset.theme === 'dark' : matchMedia('(prefers-color-scheme: dark)').matches;
  root.dataset.theme = dark ? 'light' : 'dark';
});
document.documentElement.dataset.ready = 'yes';
