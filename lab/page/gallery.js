// A gallery of tagged images, with the npm package (autotag.js is its core; docs/frontend.md).

import { refreshAsked } from './asked.js'
import { describeEta, describeStage, oneAtATime } from './autotag.js'
import { $, autotag, element, showError, supabase, token, workspace } from './client.js'
import { COLUMNS, makeEditable, showTags } from './tags.js'
import { PAUSE, uploading, uploadPhotos } from './upload-list.js'

const MAX_SHOWN = 500 // images; the newest ones
const MAX_IDS = 100 // in an address
const WITH_BAR = ['submitted', 'processing', 'completing']
const jobs = new Map() // uploads of this window and those announced by broadcasts, by job id
const assets = new Map() // rows by id, which is a number or text, as the project's keys are
const RETRY = { completed: 'Tag again', failed: 'Try again' } // what the button says

// -- rendering

/** The element of an image. */
const card = (id) => document.querySelector(`[data-asset="${CSS.escape(id)}"]`)

function show(asset) {
  assets.set(asset.id, asset)
  let item = card(asset.id)
  if (!item) {
    item = $('image').content.firstElementChild.cloneNode(true)
    item.dataset.asset = asset.id
    item.querySelector('.retry').onclick = () => enqueue([asset.id])
    item.removeTag = makeEditable(item, () => assets.get(asset.id), (row) => { show(row); refresh([row.id]) })
    $('images').append(item)
  }
  const { text, progress: part } = describeStage(asset)
  item.dataset.stage = asset.tagging_stage ?? 'none'
  item.querySelector('.badge').textContent = text
  const progress = item.querySelector('progress')
  progress.hidden = !WITH_BAR.includes(asset.tagging_stage)
  progress.value = part ?? 0
  progress.setAttribute('aria-label', text)
  showTags(item, asset, item.removeTag)
  const error = item.querySelector('.error')
  error.hidden = !(asset.tagging_error && asset.tagging_stage in RETRY) // also where autotag left the tags as they are
  error.textContent = asset.tagging_error ?? ''
  const retry = item.querySelector('.retry')
  retry.hidden = !(asset.tagging_stage in RETRY)
  retry.textContent = RETRY[asset.tagging_stage] ?? ''
  item.querySelector('img').alt = asset.tagging_result?.caption ?? `Image, ${text.toLowerCase()}`
  $('count').textContent = `(${assets.size})`
}

const doneOf = (job) => (job?.completed ?? 0) + (job?.failed ?? 0)

function showJob(job) {
  const known = jobs.get(job.job_id)
  const current = doneOf(job) < doneOf(known) ? { ...job, ...known } : { ...known, ...job } // a broadcast may arrive before the reply to an older request
  jobs.set(job.job_id, current)
  let item = document.querySelector(`[data-job="${job.job_id}"]`)
  if (!item) {
    item = $('job').content.firstElementChild.cloneNode(true)
    item.dataset.job = job.job_id
    item.querySelector('.cancel').onclick = () => cancel(job.job_id)
    $('jobs').append(item)
  }
  const done = doneOf(current)
  item.querySelector('.name').textContent = `${done} of ${current.image_count} images`
  const progress = item.querySelector('progress')
  progress.value = current.progress ?? 0
  progress.setAttribute('aria-label', `Progress of an upload of ${current.image_count} images`)
  const finished = done === current.image_count
  item.querySelector('.left').textContent = finished
    ? current.failed ? `done, ${current.failed} not tagged` : 'done'
    : current.status === 'cancelling' ? 'cancelling…' : describeEta(current.eta) ?? ''
  item.querySelector('.cancel').hidden = finished || current.status === 'cancelling'
  if (finished) progress.value = 100
  $('jobs-section').hidden = false
}

// -- fetching: after each broadcast and each (re)subscription, never by polling

/** Fetches these rows, or (null) all that are shown. */
export const refresh = oneAtATime(async (changed, signal) => {
  const ids = changed && changed.length <= MAX_IDS ? changed : null
  const query = supabase.from('assets').select(COLUMNS).eq('workspace_id', workspace).order('created_at', { ascending: false }).limit(MAX_SHOWN).abortSignal(signal)
  const { data, error } = await (ids ? query.in('id', ids) : query)
  if (error) return showError(error)
  const missing = data.filter((asset) => !assets.has(asset.id) && asset.storage_path)
  data.forEach(show)
  showUntagged()
  await showPictures(missing)
})

/** Shows how many images were uploaded and never enqueued, because their window was closed. */
function showUntagged() {
  const ids = [...assets.values()].filter((asset) => !asset.tagging_stage && !asset.tags).map((asset) => asset.id)
  $('untagged').hidden = !ids.length || uploading()
  $('untagged-count').textContent = ids.length === 1 ? '1 image is not tagged.' : `${ids.length} images are not tagged.`
  $('tag-all').onclick = () => enqueue(ids)
}

async function showPictures(rows) {
  if (!rows.length) return
  const { data } = await supabase.storage.from('assets').createSignedUrls(rows.map((row) => row.storage_path), 3600)
  for (const [i, row] of rows.entries()) {
    const url = data?.[i]?.signedUrl
    if (url) card(row.id).querySelector('img').src = url
  }
}

async function refreshUsage() {
  const { data } = await supabase.rpc('tagging_usage', { workspace_id: workspace })
  const days = new Map() // totals by day
  for (const row of data ?? []) {
    const day = days.get(row.day) ?? { images: 0, tokens: 0, cost: 0 }
    day.images += row.images
    day.tokens += row.input_tokens + row.output_tokens
    day.cost += Number(row.cost)
    days.set(row.day, day)
  }
  document.querySelector('#usage tbody').replaceChildren(...[...days].map(([day, used]) => {
    const cells = [day, used.images, used.tokens.toLocaleString('en'), `$${used.cost.toFixed(4)}`]
    return element('tr', {}, ...cells.map((text) => element('td', { textContent: text })))
  }))
}

// -- actions

async function upload(files) {
  showError(null)
  try {
    const ids = await uploadPhotos(files)
    if (ids.length) await enqueue(ids)
  } catch (error) {
    showError(error)
  }
}

/** Enqueues images, and tries again for as long as the connection is broken, like the upload before it. */
async function enqueue(ids, again = false) {
  showError(null)
  try {
    const made = await autotag.enqueue(ids)
    if (made.image_count) showJob(made)
    else if (!again) showError({ message: 'Nothing to do: these images are being tagged, or were tagged a moment ago.', hint: 'Try again in a minute.' })
  } catch (error) {
    showError(error)
    if (error.code === 'network') {
      await new Promise((resolve) => setTimeout(resolve, PAUSE))
      return enqueue(ids, true) // what the lost call has enqueued is skipped
    }
    await refresh(ids)
  }
}

async function cancel(jobId) {
  try {
    await autotag.cancel(jobId)
  } catch (error) { showError(error) }
}

// -- file input: registered before the first fetch, so that files chosen while the page loads are not lost

$('files').onchange = (event) => { upload([...event.target.files]); event.target.value = '' }
const drop = $('drop')
for (const name of ['dragenter', 'dragover']) drop.addEventListener(name, (event) => { event.preventDefault(); drop.classList.add('over') })
for (const name of ['dragleave', 'drop']) drop.addEventListener(name, () => drop.classList.remove('over'))
drop.addEventListener('drop', (event) => { event.preventDefault(); upload([...event.dataTransfer.files]) })

// -- broadcasts

if (!workspace || !token) {
  showError({ message: 'This address has no workspace or token.', hint: 'Open an address that ./scripts/demo --serve printed.' })
} else {
  $('files').disabled = false
  autotag.subscribe({
    onChange: refresh,
    onEnqueued: refresh,
    onSync() {
      refresh(null)
      autotag.jobs({ onlyLive: true }).then((jobs) => jobs.forEach(showJob), () => {}) // if it fails, their next broadcast shows them
    },
    onProgress: showJob,
    onJobComplete(job) { showJob(job); refreshUsage() },
    onStatus(status) { $('connection').textContent = status === 'live' ? 'Live' : 'Disconnected. Reconnecting…' },
  })
  addEventListener('focus', () => refresh(null)) // people's edits in other windows are not broadcast
  await refresh(null)
  await Promise.all([refreshUsage(), refreshAsked()])
}
