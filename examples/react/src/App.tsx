import { useEffect, useState } from 'react'
import type { FormEvent } from 'react'
import { Gallery } from './Gallery'
import { supabase } from './supabase'

/** Signs in, and finds the user's first workspace. */
export function App() {
  const [userId, setUserId] = useState<string | null>(null)
  const [workspaceId, setWorkspaceId] = useState<string | null>(null)
  const [error, setError] = useState('')

  useEffect(() => {
    const { data } = supabase.auth.onAuthStateChange((_, session) => setUserId(session?.user.id ?? null))
    return () => data.subscription.unsubscribe()
  }, [])

  useEffect(() => {
    setWorkspaceId(null)
    if (!userId) return
    let wanted = true
    void supabase.from('workspace_members').select('workspace_id').eq('user_id', userId).limit(1).then(({ data, error }) => {
      if (!wanted) return
      setError(error?.message ?? (data?.length ? '' : 'You are in no workspace.'))
      setWorkspaceId(data?.[0]?.workspace_id ?? null)
    })
    return () => { wanted = false }
  }, [userId])

  async function signIn(event: FormEvent<HTMLFormElement>) {
    event.preventDefault()
    const form = new FormData(event.currentTarget)
    const { error } = await supabase.auth.signInWithPassword({ email: String(form.get('email')), password: String(form.get('password')) })
    setError(error?.message ?? '')
  }

  return (
    <main>
      <p role="alert">{error}</p>
      {!userId && (
        <form onSubmit={signIn}>
          <input name="email" type="email" aria-label="E-mail" required />
          <input name="password" type="password" aria-label="Password" required />
          <button>Sign in</button>
        </form>
      )}
      {userId && <button onClick={() => supabase.auth.signOut()}>Sign out</button>}
      {workspaceId && <Gallery workspaceId={workspaceId} />}
    </main>
  )
}
