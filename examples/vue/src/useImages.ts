import { AutotagError, createAutotag, oneAtATime } from 'supabase-autotag'
import type { LiveStatus } from 'supabase-autotag'
import { onUnmounted, ref, shallowRef } from 'vue'
import type { Database } from './database'
import { supabase } from './supabase'

const COLUMNS = 'id, created_at, storage_path, tagging_stage, tagging_progress, tagging_eta, tagging_error, tags'
const SHOWN = 100 // images; the newest ones
type Row = Database['public']['Tables']['assets']['Row']
export type Image = Pick<Row, 'id' | 'created_at' | 'storage_path' | 'tagging_stage' | 'tagging_progress' | 'tagging_eta' | 'tagging_error' | 'tags'>

/** The newest images of a workspace, on the core package: the rows are fetched when a message says that they have changed. */
export function useImages(workspaceId: string) {
  const autotag = createAutotag(supabase, { workspaceId })
  const images = shallowRef<Image[]>([])
  const status = ref<LiveStatus>('connecting')
  const problem = ref('')

  const refresh = oneAtATime<string>(async (changed, signal) => {
    const ids = changed && changed.length <= 100 ? changed : null // an address has its limits
    const newest = supabase.from('assets').select(COLUMNS).eq('workspace_id', workspaceId)
      .order('created_at', { ascending: false }).order('id').limit(SHOWN).abortSignal(signal)
    const { data, error } = await (ids ? newest.in('id', ids) : newest)
    if (error) { problem.value = error.message; return }
    const rows = new Map((ids ? images.value : []).map((image) => [image.id, image]))
    for (const id of ids ?? []) rows.delete(id)
    for (const image of data) rows.set(image.id, image)
    images.value = [...rows.values()].sort((a, b) => b.created_at.localeCompare(a.created_at) || a.id.localeCompare(b.id)).slice(0, SHOWN)
  })

  onUnmounted(autotag.subscribe({
    onChange: refresh,
    onEnqueued: refresh,
    onSync: () => { void refresh(null) },
    onStatus: (now) => { status.value = now },
    onUserChange: () => { images.value = [] },
  }))
  void refresh(null)

  async function add(files: readonly File[]) {
    problem.value = ''
    try {
      const ids: string[] = []
      for (const file of files) {
        const path = `${workspaceId}/${crypto.randomUUID()}`
        const { error } = await supabase.storage.from('assets').upload(path, file, { contentType: file.type })
        if (error) throw error
        // the database has inserted the row with the file
        const { data } = await supabase.from('assets').select('id').eq('storage_bucket', 'assets').eq('storage_path', path).single().throwOnError()
        ids.push(data.id)
      }
      await autotag.enqueue(ids)
    } catch (error) {
      problem.value = error instanceof AutotagError ? `${error.message} ${error.hint}` : (error as Error).message
      await refresh(null)
    }
  }

  return { images, status, problem, add }
}
