// The workspace's vocabulary and profile, which every request uses. Members see them, editors change them
// (docs/vocabulary.md, docs/profiles.md).
import { $, element, showError, supabase, workspace } from './client.js'

const MAX_SHOWN = 200 // tags of a vocabulary; more are found with the filter
let vocabulary = { tags: [], may_edit: false }
let profile = {}
let filled = {} // the profile that the form was filled with

/** The call's result; an error is shown and thrown. */
async function call(name, given = {}) {
  showError(null, $('asked-notice'))
  const { data, error } = await supabase.rpc(name, { workspace_id: workspace, ...given })
  if (!error) return data
  showError(error, $('asked-notice'))
  throw error
}

/** Reads both, and shows them to members. The database refuses these calls to anybody else. */
export async function refreshAsked() {
  try {
    [vocabulary, profile] = await Promise.all([call('tagging_vocabulary'), call('tagging_profile')])
  } catch (error) {
    $('asked').hidden = true
    return showError(error)
  }
  $('asked').hidden = false
  $('asked-who').textContent = vocabulary.may_edit ? '' : 'You can read this. Only editors of the workspace can change it.'
  showVocabulary()
  showProfile()
}

function showVocabulary() {
  const wanted = $('find').value.trim().toLowerCase()
  const found = vocabulary.tags.filter(({ tag, aliases }) => [tag, ...aliases].some((name) => name.toLowerCase().includes(wanted)))
  $('find-label').hidden = vocabulary.tags.length <= 20
  $('words').replaceChildren(...found.slice(0, MAX_SHOWN).map(showWord))
  const left = found.length - MAX_SHOWN
  $('words-note').textContent = vocabulary.tags.length === 0 ? 'The vocabulary is empty.'
    : found.length === 0 ? 'No tag has this in its name.' : left > 0 ? `and ${left.toLocaleString('en')} more` : ''
  $('words-count').textContent = `(${vocabulary.tags.length.toLocaleString('en')})`
  $('word-form').hidden = !vocabulary.may_edit
  $('known').replaceChildren(...vocabulary.tags.slice(0, MAX_SHOWN).map(({ tag }) => element('option', { value: tag })))
}

function showWord({ tag, aliases, description, parent, general }) {
  const about = [aliases.length && `also ${aliases.join(', ')}`, parent && `under ${parent}`, general && 'for all workspaces']
  const line = element('li', { title: description ?? '' }, element('span', { className: 'tag', textContent: tag }))
  const text = about.filter(Boolean).join(' · ')
  if (text) line.append(element('span', { className: 'by', textContent: text }))
  if (vocabulary.may_edit && !general) {
    const button = element('button', { type: 'button', className: 'remove', textContent: '×', title: `Remove ${tag}` })
    button.setAttribute('aria-label', `Remove ${tag} from the vocabulary`)
    button.onclick = async () => {
      if (await saved(() => call('edit_tagging_vocabulary', { entries: [], removed: [tag] }), `${tag} removed.`)) $('word').focus()
    }
    line.append(button)
  }
  return line
}

/** Makes a change, reads both again, and says that the change is saved. */
async function saved(change, said) {
  try {
    await change()
  } catch {
    return false // the error is shown
  }
  await refreshAsked()
  $('asked-said').textContent = said
  return true
}

/** The profile in the form. Empty fields have their defaults. */
const written = () => ({
  instructions: $('instructions').value.trim(),
  language: $('language').value.trim() || null,
  tag_count: $('tag-count').value === '' ? null : Number($('tag-count').value),
  vocabulary_mode: $('mode').value,
})

function showProfile() {
  const form = $('profile')
  if (form.dirty) return // the user is editing it
  filled = profile
  for (const [id, value] of Object.entries({
    instructions: profile.instructions, language: profile.language, 'tag-count': profile.tag_count, mode: profile.vocabulary_mode,
  })) $(id).value = value ?? ''
  for (const field of form.querySelectorAll('input, textarea')) field.readOnly = !vocabulary.may_edit
  $('mode').disabled = !vocabulary.may_edit
  $('save').hidden = !vocabulary.may_edit
}

$('profile').oninput = () => { $('profile').dirty = true }
$('profile').onsubmit = async (event) => {
  event.preventDefault()
  // Send only what this person has changed, because somebody else may have changed the rest meanwhile.
  const changes = Object.fromEntries(Object.entries(written()).filter(([name, value]) => value !== (filled[name] ?? null)))
  await saved(async () => {
    await call('set_tagging_profile', { profile: changes })
    $('profile').dirty = false
  }, 'Saved. It applies to uploads from now on; tag an image again to ask anew.')
}

$('word-form').onsubmit = async (event) => {
  event.preventDefault()
  const tag = $('word').value.trim()
  const aliases = $('aliases').value.split(',').map((name) => name.trim()).filter(Boolean)
  if (!tag) return
  const entry = aliases.length ? { tag, aliases } : { tag }
  if (!await saved(() => call('edit_tagging_vocabulary', { entries: [entry] }), `${tag} added.`)) return
  $('word').value = $('aliases').value = ''
  $('word').focus()
}

$('find').oninput = showVocabulary
$('asked').ontoggle = () => { if ($('asked').open) refreshAsked() }
