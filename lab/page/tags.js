// The tags of an image: whose each one is, and how a person adds and removes them (docs/frontend.md, "Editing tags").
import { $, element, showError, supabase } from './client.js'

export const COLUMNS = 'id, storage_path, tagging_stage, tagging_progress, tagging_eta, tagging_error, tags, tagging_result'
const ATTEMPTS = 5 // at one edit, each with the newest row

/** The form in which two tags are compared. */
const key = (tag) => tag.normalize('NFC').toLowerCase().replace(/\s+/g, ' ').trim()

/** An array as Postgres writes it. */
const literal = (tags) => `{${tags.map((tag) => tag === null ? 'null' : `"${tag.replace(/["\\]/g, '\\$&')}"`).join()}}`

/**
 * Writes edit(tags), and returns the new row. The update applies only to the list that was read. If a run or another window has changed the
 * list meanwhile, the edit is repeated with the newer list. An edit that returns null changes nothing.
 */
export async function editTags(asset, edit) {
  let row = asset
  for (let attempt = 0; attempt < ATTEMPTS; attempt++) {
    const tags = edit(row.tags ?? [])
    if (!tags) return row
    const update = supabase.from('assets').update({ tags }).eq('id', row.id)
    const { data } = await (row.tags ? update.eq('tags', literal(row.tags)) : update.is('tags', null))
      .select(COLUMNS).throwOnError()
    if (data.length) return data[0]
    const { data: [current] } = await supabase.from('assets').select(COLUMNS).eq('id', row.id).throwOnError()
    if (!current) throw { message: 'This image is no longer there.', hint: 'Reload the page.' }
    if (JSON.stringify(current.tags) === JSON.stringify(row.tags)) {
      throw { message: 'You may not change the tags of this image.', hint: 'Ask an owner of the project.' }
    }
    row = current
  }
  throw { message: 'The tags of this image keep changing.', hint: 'Try again in a moment.' }
}

export const addTag = (asset, tag) =>
  editTags(asset, (tags) => tags.some((other) => other !== null && key(other) === key(tag)) ? null : [...tags, tag])

export const removeTag = (asset, tag) =>
  editTags(asset, (tags) => tags.includes(tag) ? tags.filter((other) => other !== tag) : null)

/** Who gave a tag, as text. Tags that autotag gave are in the row's list `given`; every other one is a person's. */
function giver(tag, result) {
  if (!result?.given?.includes(tag)) return { by: 'person', short: 'person', long: 'added by a person' }
  const confidence = result.confidence?.[tag]
  const percent = confidence === undefined ? '' : ` ${Math.round(confidence * 100)} %`
  return { by: 'autotag', short: `AI${percent}`, long: `given by autotag${percent && `, confidence${percent}`}` }
}

/** Replaces a card's list of tags only if it has changed, so that the focus stays where it is. */
export function showTags(item, asset, remove) {
  const list = item.querySelector('.tags')
  const tags = (asset.tags ?? []).filter((tag) => typeof tag === 'string')
  const shown = JSON.stringify([tags, tags.map((tag) => giver(tag, asset.tagging_result))])
  list.hidden = !tags.length
  if (list.shown === shown) return
  list.shown = shown
  list.replaceChildren(...tags.map((tag) => {
    const { by, short, long } = giver(tag, asset.tagging_result)
    const button = element('button', { type: 'button', className: 'remove', textContent: '×', title: `Remove ${tag}` })
    button.setAttribute('aria-label', `Remove the tag ${tag}`)
    button.onclick = () => remove(tag)
    const label = element('span', { className: 'by', title: long, textContent: short })
    const line = element('li', {}, element('span', { className: 'tag', textContent: tag }), label, button)
    line.dataset.by = by
    return line
  }))
}

/** Makes the tags of a new card editable. `current` returns its newest row; `changed` is called with the row after an edit. */
export function makeEditable(item, current, changed) {
  const [form, input] = [item.querySelector('.add'), item.querySelector('.add input')]
  const edit = async (change, tag, said) => {
    showError(null)
    try {
      changed(await change(current(), tag))
      $('said').textContent = `${said}: ${tag}`
      return true
    } catch (error) {
      showError(error)
      return false
    }
  }
  form.onsubmit = async (event) => {
    event.preventDefault()
    const tag = input.value.replace(/\s+/g, ' ').trim()
    if (tag && await edit(addTag, tag, 'Tag added')) input.value = ''
  }
  return async (tag) => {
    await edit(removeTag, tag, 'Tag removed')
    input.focus() // the button that was clicked is gone
  }
}
