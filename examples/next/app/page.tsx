import { createServerClient } from '@supabase/ssr'
import { cookies } from 'next/headers'
import type { Database } from './database'
import { Gallery } from './gallery'
import { COLUMNS, PAGE_SIZE } from './images'
import { SignIn } from './sign-in'

export const dynamic = 'force-dynamic' // each user sees their own images

/** Renders the first page of the user's first workspace on the server. */
export default async function Page() {
  const store = await cookies()
  const supabase = createServerClient<Database>(process.env.NEXT_PUBLIC_SUPABASE_URL!, process.env.NEXT_PUBLIC_SUPABASE_PUBLISHABLE_KEY!, {
    cookies: { getAll: () => store.getAll() },
  })
  const { data: { user } } = await supabase.auth.getUser()
  if (!user) return <SignIn />
  const { data: members } = await supabase.from('workspace_members').select('workspace_id').eq('user_id', user.id).limit(1)
  const workspaceId = members?.[0]?.workspace_id
  if (!workspaceId) return <p>You are in no workspace.</p>
  const { data: images } = await supabase.from('assets').select(COLUMNS).eq('workspace_id', workspaceId)
    .order('created_at', { ascending: false }).order('id', { ascending: false }).limit(PAGE_SIZE)
  return <Gallery key={user.id} workspaceId={workspaceId} initialRows={images ?? []} />
}
