// A gallery whose images are tagged. The twenty lines that matter are in docs/frontend.md: enqueue, listen, refetch.
// The page's address says who looks: #workspace=…&token=… (a member's JWT); /config.json names the project.

const config = await (await fetch('config.json')).json()
const who = new URLSearchParams(location.hash.slice(1))
const workspace = who.get('workspace')
const token = who.get('token')
const supabase = window.supabase.createClient(config.url, config.anonKey, { accessToken: async () => token })

const COLUMNS = 'id, storage_path, tagging_stage, tagging_progress, tagging_eta, tagging_error, tags, tagging_result'
const SHOWN = 500 // newest images on the page
const $ = (id) => document.getElementById(id)
const jobs = new Map() // uploads of this window, and those it heard of, by job id
const assets = new Map() // rows by id

// -- what is shown

/** The text of a stage, and whether a bar goes with it. */
function describe(asset) {
  switch (asset.tagging_stage) {
    case 'queued': return { text: 'Queued for tagging' }
    case 'preparing': return { text: 'Preparing images…' }
    case 'submitted': return { text: 'Submitted to AI', bar: asset.tagging_progress }
    case 'processing': return { text: `AI analyzing${timeLeft(asset.tagging_eta)}`, bar: asset.tagging_progress }
    case 'completing': return { text: 'Saving tags…', bar: 90 }
    case 'completed': return { text: 'Tagged' }
    case 'failed': return { text: 'Not tagged' }
    default: return { text: 'Not tagged yet' }
  }
}

function timeLeft(eta) {
  if (!eta) return ''
  const minutes = Math.ceil((new Date(eta) - Date.now()) / 60_000)
  if (minutes < 1) return ' (less than a minute)'
  return minutes < 90 ? ` (~${minutes} min)` : ` (~${Math.round(minutes / 60)} h)`
}

function show(asset) {
  const before = assets.get(asset.id)
  assets.set(asset.id, { ...before, ...asset })
  let item = document.querySelector(`[data-asset="${asset.id}"]`)
  if (!item) {
    item = $('image').content.firstElementChild.cloneNode(true)
    item.dataset.asset = asset.id
    item.querySelector('.retry').onclick = () => enqueue([asset.id])
    $('images').append(item)
  }
  const { text, bar } = describe(asset)
  item.dataset.stage = asset.tagging_stage ?? 'none'
  item.querySelector('.badge').textContent = text
  const progress = item.querySelector('progress')
  progress.hidden = bar === undefined
  progress.value = bar ?? 0
  progress.setAttribute('aria-label', text)
  const tags = item.querySelector('.tags')
  tags.hidden = asset.tagging_stage !== 'completed'
  tags.replaceChildren(...(asset.tags ?? []).map((tag) => Object.assign(document.createElement('li'), { textContent: tag })))
  const error = item.querySelector('.error')
  error.hidden = asset.tagging_stage !== 'failed'
  error.textContent = asset.tagging_error ?? ''
  item.querySelector('.retry').hidden = asset.tagging_stage !== 'failed'
  item.querySelector('img').alt = asset.tagging_result?.caption ?? `Image, ${text.toLowerCase()}`
  $('count').textContent = `(${assets.size})`
}

function showJob(job) {
  const known = { ...jobs.get(job.job_id), ...job }
  jobs.set(job.job_id, known)
  let item = document.querySelector(`[data-job="${job.job_id}"]`)
  if (!item) {
    item = $('job').content.firstElementChild.cloneNode(true)
    item.dataset.job = job.job_id
    item.querySelector('.cancel').onclick = () => cancel(job.job_id)
    $('jobs').append(item)
  }
  const done = (known.completed ?? 0) + (known.failed ?? 0)
  item.querySelector('.name').textContent = `${done} of ${known.image_count} images`
  const progress = item.querySelector('progress')
  progress.value = known.progress ?? 0
  progress.setAttribute('aria-label', `Progress of an upload of ${known.image_count} images`)
  const over = done === known.image_count
  item.querySelector('.left').textContent = over
    ? known.failed ? `done, ${known.failed} not tagged` : 'done'
    : timeLeft(known.eta).trim().replace(/^\(|\)$/g, '')
  item.querySelector('.cancel').hidden = over
  if (over) progress.value = 100
  $('jobs-section').hidden = false
}

/** What went wrong, with what to do: every refusal has a message and a hint. */
function complain(error) {
  $('notice').textContent = error ? [error.message, error.hint].filter(Boolean).join(' ') : ''
}

// -- what is fetched: when something was told, and when the channel is joined (again), never by the clock

async function refetch() {
  const { data, error } = await supabase.from('assets').select(COLUMNS)
    .eq('workspace_id', workspace).order('created_at', { ascending: false }).limit(SHOWN)
  if (error) return complain(error)
  const missing = data.filter((asset) => !assets.has(asset.id) && asset.storage_path)
  data.forEach(show)
  await showPictures(missing)
}

async function showPictures(rows) {
  if (!rows.length) return
  const { data } = await supabase.storage.from('assets').createSignedUrls(rows.map((row) => row.storage_path), 3600)
  for (const [i, row] of rows.entries()) {
    const url = data?.[i]?.signedUrl
    if (url) document.querySelector(`[data-asset="${row.id}"] img`).src = url
  }
}

let fetching = null
let again = false
/** One fetch at a time; what is told meanwhile makes one more. */
function refresh() {
  if (fetching) { again = true; return fetching }
  fetching = refetch().finally(() => {
    fetching = null
    if (again) { again = false; refresh() }
  })
  return fetching
}

async function refreshUsage() {
  const { data } = await supabase.rpc('tagging_usage', { workspace_id: workspace })
  const days = new Map()
  for (const row of data ?? []) {
    const day = days.get(row.day) ?? { images: 0, tokens: 0, cost: 0 }
    day.images += row.images
    day.tokens += row.input_tokens + row.output_tokens
    day.cost += Number(row.cost)
    days.set(row.day, day)
  }
  document.querySelector('#usage tbody').replaceChildren(...[...days].map(([day, used]) => {
    const line = document.createElement('tr')
    for (const text of [day, used.images, used.tokens.toLocaleString('en'), `$${used.cost.toFixed(4)}`]) {
      line.append(Object.assign(document.createElement('td'), { textContent: text }))
    }
    return line
  }))
}

// -- what is done

async function upload(files) {
  complain(null)
  const chosen = [...files]
  const stored = []
  for (const file of chosen) {
    const path = `${workspace}/${crypto.randomUUID()}${file.name.match(/\.\w{1,5}$/)?.[0] ?? ''}`
    const { error } = await supabase.storage.from('assets').upload(path, file, { contentType: file.type })
    if (error) complain(error)
    else stored.push({ id: crypto.randomUUID(), workspace_id: workspace, storage_path: path })
  }
  if (!stored.length) return
  const { error } = await supabase.from('assets').insert(stored)
  if (error) return complain(error)
  await enqueue(stored.map((row) => row.id))
}

async function enqueue(ids) {
  complain(null)
  const { data, error } = await supabase.rpc('enqueue_tagging', { asset_ids: ids })
  if (error) complain(error)
  else showJob(data)
  await refresh()
}

async function cancel(jobId) {
  const { error } = await supabase.rpc('cancel_tagging', { job_id: jobId })
  if (error) complain(error)
  await refresh()
}

// -- what is heard: before the rows are awaited, so that what is chosen early is not lost

$('files').onchange = (event) => { upload(event.target.files).then(() => { event.target.value = '' }) }
const drop = $('drop')
for (const name of ['dragenter', 'dragover']) drop.addEventListener(name, (event) => { event.preventDefault(); drop.classList.add('over') })
for (const name of ['dragleave', 'drop']) drop.addEventListener(name, () => drop.classList.remove('over'))
drop.addEventListener('drop', (event) => { event.preventDefault(); upload(event.dataTransfer.files) })

// -- who tells

if (!workspace || !token) {
  complain({ message: 'This address names nobody.', hint: 'Open the one that ./scripts/demo --serve printed.' })
} else {
  $('files').disabled = false
  await supabase.realtime.setAuth(token)
  supabase.channel(`tagging:${workspace}`, { config: { private: true } })
    .on('broadcast', { event: 'job-progress' }, ({ payload }) => { showJob(payload); refresh() })
    .on('broadcast', { event: 'batch-complete' }, refresh)
    .on('broadcast', { event: 'job-complete' }, ({ payload }) => { showJob(payload); refresh(); refreshUsage() })
    .subscribe((status) => {
      $('connection').textContent = status === 'SUBSCRIBED' ? 'Live' : 'Not connected; trying again…'
      if (status === 'SUBSCRIBED') refresh() // what was told while nobody listened is in the rows
    })
  await refresh()
  await refreshUsage()
}
