// What every part of the page needs: the client, the user, and how to show errors.
// The address has the workspace and the member's JWT: #workspace=…&token=…. /config.json has the project's URL and key.

import { createAutotag } from './autotag.js'

export const config = await (await fetch('config.json')).json()
const parameters = new URLSearchParams(location.hash.slice(1))
export const workspace = parameters.get('workspace')
export const token = parameters.get('token')
export const supabase = window.supabase.createClient(config.url, config.anonKey, { accessToken: async () => token })
export const autotag = createAutotag(supabase, { workspaceId: workspace })

export const $ = (id) => document.getElementById(id)

/** Makes an element. Text of users and models is never read as HTML. */
export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties)
  made.append(...children)
  return made
}

/** Shows an error. Every error of the SQL API has a message and a hint that says what to do. */
export function showError(error, place = $('notice')) {
  place.textContent = error ? [error.message, error.hint].filter(Boolean).join(' ') : ''
}
