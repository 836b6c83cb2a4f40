// The list of uploads: a line with a progress bar for each file. upload.js sends the files.
import { $, config, supabase, token, workspace } from './client.js'
import { storeFile } from './upload.js'

const AT_ONCE = 3 // files
const NAMES = 50 // paths in one request, because its URL must not get too long
export const PAUSE = 2000 // milliseconds between two attempts at a request
const storage = { url: config.url, key: config.anonKey, token: async () => token, bucket: 'assets', folder: workspace }
const running = new Set() // selections that are being uploaded, each with its AbortController

export const uploading = () => running.size > 0
addEventListener('beforeunload', (event) => { if (uploading()) event.preventDefault() })
$('stop').onclick = () => { for (const { stopping } of running) stopping.abort() }

/** Uploads files and returns the ids of their rows. Files that cannot be uploaded stay in the list, with the reason. */
export async function uploadPhotos(files) {
  if (!uploading()) $('uploads').replaceChildren()
  const selection = { stopping: new AbortController(), lines: [...files].map(makeLine) }
  running.add(selection)
  showTotal()
  try {
    const waiting = [...selection.lines]
    const lane = async () => { for (let line; (line = waiting.shift());) await storeLine(line, selection.stopping.signal) }
    await Promise.all(Array.from({ length: AT_ONCE }, lane))
    return await findRows(selection)
  } finally {
    running.delete(selection)
    for (const line of selection.lines) if (line.path) line.item.remove()
    const stored = selection.lines.filter((line) => line.path).length
    $('said').textContent = `${stored} of ${selection.lines.length} photos uploaded`
    showTotal()
  }
}

function makeLine(file) {
  const item = $('file').content.firstElementChild.cloneNode(true)
  const line = { file, item, path: null, sent: 0 }
  item.querySelector('.name').textContent = file.name
  show(line, 'waiting', 'Waiting')
  $('uploads').append(item)
  return line
}

function show(line, state, text, sent = line.sent) {
  line.sent = sent
  line.item.dataset.state = state
  line.item.querySelector('.left').textContent = text
  const progress = line.item.querySelector('progress')
  progress.value = sent
  progress.setAttribute('aria-label', `Upload of ${line.file.name}`)
  showTotal()
}

/** All selections together. Called often; the browser paints once. */
function showTotal() {
  const lines = [...running].flatMap((selection) => selection.lines)
  const stored = lines.filter((line) => line.path).length
  const bytes = (share) => lines.reduce((sum, line) => sum + line.file.size * share(line), 0)
  $('uploading').hidden = !$('uploads').children.length && !lines.length
  $('stop').hidden = !lines.length
  $('uploads-total').hidden = !lines.length
  $('uploads-total').value = bytes((line) => line.sent) / (bytes(() => 1) || 1)
  $('uploads-count').textContent = lines.length ? `${stored} of ${lines.length} photos uploaded. Keep this page open.`
    : `These photos were not uploaded.${$('uploads').querySelector('[data-state=stopped]') ? ' Choose them again to go on where they stopped.' : ''}`
}

async function storeLine(line, signal) {
  try {
    const { path, there } = await storeFile(line.file, storage, {
      progress: (sent) => show(line, 'sending', `${Math.floor(sent * 100)} %`, sent),
      waiting: () => show(line, 'broken', 'Waiting for the connection…'),
      signal,
    })
    line.path = path
    line.there = there
    show(line, 'stored', there ? 'Already there' : 'Uploaded', 1)
    $('uploads').append(line.item) // those still under way are at the top
  } catch (error) {
    show(line, ...signal.aborted ? ['stopped', 'Stopped'] : ['failed', error.message])
    line.item.querySelector('progress').hidden = true
  }
}

/**
 * The ids of a selection's rows. The database inserts a file's row together with the file. If a file has no row, either it has not arrived
 * after all (Storage received all bytes and then failed to create the object), or somebody has deleted the row.
 */
async function findRows({ lines, stopping }) {
  const paths = () => [...new Set(lines.filter((line) => line.path).map((line) => line.path))]
  const rows = await rowsOf(paths())
  const missing = new Map(lines.filter((line) => line.path && !rows.has(line.path)).map((line) => [line.path, line]))
  for (const [path, line] of missing) {
    line.path = null
    await storeLine(line, stopping.signal)
    if (line.there) await ask(() => supabase.from('assets').insert({ workspace_id: workspace, storage_bucket: 'assets', storage_path: path }))
  }
  return [...(missing.size ? await rowsOf(paths()) : rows).values()]
}

async function rowsOf(paths) {
  const rows = new Map()
  for (let i = 0; i < paths.length; i += NAMES) {
    const some = paths.slice(i, i + NAMES)
    const query = () => supabase.from('assets').select('id, storage_path').eq('workspace_id', workspace).in('storage_path', some)
    for (const row of await ask(query)) rows.set(row.storage_path, row.id)
  }
  return rows
}

/** The rows that a request returns. The request is repeated while the connection is broken. */
async function ask(query) {
  for (;;) {
    const { data, error, status } = await query()
    if (!error) return data ?? []
    if (error.code === '23505') return [] // another window was faster
    if (status) throw error
    await new Promise((resolve) => setTimeout(resolve, PAUSE))
  }
}
