// Upload, progress, tags and a filter by tag, in plain JavaScript: no bundler and no framework.
import { createAutotag, describeStage, oneAtATime } from 'https://cdn.jsdelivr.net/npm/supabase-autotag@0.1/dist/index.js'
import { key, url } from './config.js'

const SHOWN = 100 // images; the newest ones
const COLUMNS = 'id, created_at, storage_path, tagging_stage, tagging_progress, tagging_eta, tagging_error, tags'
const supabase = window.supabase.createClient(url, key)
const $ = (id) => document.getElementById(id)
const complain = (error) => { $('problem').textContent = error ? [error.message, error.hint].filter(Boolean).join(' ') : '' }

function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties)
  made.append(...children)
  return made
}

// -- sign in, and find the user's first workspace

$('sign-in').onsubmit = async (event) => {
  event.preventDefault()
  const { error } = await supabase.auth.signInWithPassword(Object.fromEntries(new FormData(event.target)))
  complain(error)
}

let stop = () => {}
let shownFor = null
supabase.auth.onAuthStateChange((_, session) => {
  const user = session?.user.id ?? null
  if (user === shownFor) return
  shownFor = user
  stop()
  $('images').replaceChildren()
  $('jobs').replaceChildren()
  $('sign-in').hidden = Boolean(user)
  $('gallery').hidden = !user
  if (user) setTimeout(() => open(user)) // not within the callback
})

async function open(user) {
  const { data, error } = await supabase.from('workspace_members').select('workspace_id').eq('user_id', user).limit(1)
  complain(error ?? (data.length ? null : { message: 'You are in no workspace.' }))
  if (data?.length && user === shownFor) stop = gallery(data[0].workspace_id)
}

// -- a workspace's images

function gallery(workspaceId) {
  const autotag = createAutotag(supabase, { workspaceId })
  const images = new Map()
  const shownOf = new Map() // images of an upload that are done; Infinity: it is over

  const refresh = oneAtATime(async (ids, signal) => {
    let query = supabase.from('assets').select(COLUMNS).eq('workspace_id', workspaceId)
      .order('created_at', { ascending: false }).order('id').limit(SHOWN).abortSignal(signal)
    if (ids && ids.length > 100) ids = null // an address has its limits
    if (ids) query = query.in('id', ids)
    if ($('tag').value) query = query.contains('tags', quote([$('tag').value]))
    const { data, error } = await query
    if (error) return complain(error)
    for (const id of ids ?? images.keys()) images.delete(id)
    for (const image of data) images.set(image.id, image)
    show()
  })

  function show() {
    // What a person is typing stays, with its cursor: each image keeps its field.
    const fields = new Map([...$('images').children].map((item) => [item.dataset.id, item.querySelector('input')]))
    const typing = document.activeElement
    const rows = [...images.values()].sort((a, b) => b.created_at.localeCompare(a.created_at) || a.id.localeCompare(b.id))
    $('images').replaceChildren(...rows.slice(0, SHOWN).map((image) => {
      const { text, progress, live, error } = describeStage(image)
      const item = element('li', {}, text)
      item.dataset.id = image.id
      item.dataset.stage = image.tagging_stage ?? 'none'
      if (live) item.append(element('progress', { value: progress, ariaLabel: text }))
      if (error) item.append(element('span', { textContent: error }))
      const tags = element('ul', { ariaLabel: 'Tags' }, ...(image.tags ?? []).map((tag) => element('li', {}, `${tag} `,
        element('button', { textContent: '×', ariaLabel: `Remove ${tag}`, onclick: () => edit(image, (all) => all.filter((other) => other !== tag)) }))))
      const field = fields.get(image.id) ?? element('input', { name: 'tag', ariaLabel: 'Add a tag' })
      const form = element('form', {}, field, element('button', { textContent: 'Add' }))
      form.onsubmit = (event) => {
        event.preventDefault()
        const tag = field.value.trim()
        field.value = ''
        if (tag) edit(image, (all) => all.includes(tag) ? all : [...all, tag])
      }
      item.append(tags, form)
      return item
    }))
    if (typing.isConnected) typing.focus()
  }

  function showJob(job, over) {
    const done = over ? Infinity : job.completed + job.failed
    if (done < shownOf.get(job.job_id)) return // an answer that a message has overtaken
    shownOf.set(job.job_id, done)
    document.getElementById(job.job_id)?.remove()
    const cancel = element('button', { textContent: 'Cancel', onclick: () => autotag.cancel(job.job_id).catch(complain) })
    $('jobs').append(element('li', { id: job.job_id }, `${job.completed + job.failed} of ${job.image_count} images `, ...over ? [] : [cancel]))
  }

  async function edit(image, change) {
    try {
      images.set(image.id, await editTags(image, change))
      show()
    } catch (error) { complain(error) }
  }

  $('tag').oninput = () => refresh(null)
  $('files').onchange = async ({ target }) => {
    complain(null)
    try {
      const ids = []
      for (const file of target.files) {
        const path = `${workspaceId}/${crypto.randomUUID()}`
        const { error } = await supabase.storage.from('assets').upload(path, file, { contentType: file.type })
        if (error) throw error
        // the database has inserted the row with the file
        const { data } = await supabase.from('assets').select('id').eq('storage_bucket', 'assets').eq('storage_path', path).single().throwOnError()
        ids.push(data.id)
      }
      await autotag.enqueue(ids)
    } catch (error) {
      complain(error) // a quota says how many images are left
      refresh(null)
    }
  }

  refresh(null)
  return autotag.subscribe({
    onChange: refresh,
    onEnqueued: refresh,
    onSync() {
      refresh(null)
      autotag.jobs({ onlyLive: true }).then((jobs) => jobs.forEach((job) => showJob(job, false)), complain)
    },
    onProgress: (job) => showJob(job, false),
    onJobComplete: (job) => showJob(job, true),
    onStatus(status, error) { $('status').textContent = status === 'live' ? 'Live' : error?.hint || 'Connecting…' },
  })
}

// -- editing tags

const quote = (tags) => `{${tags.map((tag) => `"${tag.replace(/["\\]/g, '\\$&')}"`).join()}}`

/** Writes change(tags) if the list is still the one that the page shows; otherwise the edit is made again, to the newer list. */
async function editTags(image, change, attempts = 5) {
  const update = supabase.from('assets').update({ tags: change(image.tags ?? []) }).eq('id', image.id)
  const { data } = await (image.tags ? update.filter('tags', 'eq', quote(image.tags)) : update.is('tags', null)).select(COLUMNS).throwOnError()
  if (data.length) return data[0]
  const { data: current } = await supabase.from('assets').select(COLUMNS).eq('id', image.id).single().throwOnError()
  if (!attempts) throw new Error('You may not change the tags of this image, or they keep changing.')
  return editTags(current, change, attempts - 1)
}
